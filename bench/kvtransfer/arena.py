"""Contenders measured side by side: in every round each gets a slice of time, so that all see the same drift.

A fraction is taken within a round, and the round with the median fraction is shown with its own value and ceiling.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.kvtransfer.contenders import Contender
from bench.kvtransfer.remote import RemoteFailed
from bench.report import Report, Row

FOREIGN_CORES = 0.25
"""Others used more than that of the machine during a slice: it is measured again, twice at most."""
_TRIES = 3
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    gbps: float
    cpu_s_per_gb: float  # both processes
    foreign_cores: float


@dataclass(slots=True)
class Series:
    name: str
    slices: list[Slice] = field(default_factory=list)
    failure: str = ""

    @property
    def gbps(self) -> float:
        return statistics.median(one.gbps for one in self.slices)

    @property
    def cpu_s_per_gb(self) -> float:
        return statistics.median(one.cpu_s_per_gb for one in self.slices)

    @property
    def note(self) -> str:
        foreign = statistics.median(one.foreign_cores for one in self.slices)
        return f"others used {foreign:.1f} cores" if foreign > FOREIGN_CORES else ""


def busy_s() -> float:
    """Processor seconds of the whole machine."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / _TICKS_S


def take(contender: Contender, slice_s: float) -> Slice:
    """As many whole moves as fit, two at least."""
    contender.thaw()
    contender.once()
    own_s, all_s, begin_s = contender.cpu_s() + time.process_time(), busy_s(), time.perf_counter()
    cpu_begin_s = contender.cpu_s()
    seconds = [contender.once(), contender.once()]
    while time.perf_counter() - begin_s < slice_s:
        seconds.append(contender.once())
    cpu_s = contender.cpu_s() - cpu_begin_s
    wall_s = time.perf_counter() - begin_s
    foreign_s = busy_s() - all_s - (contender.cpu_s() + time.process_time() - own_s)
    contender.freeze()
    gigabytes = contender.shape.bytes / 1e9
    return Slice(
        gbps=gigabytes / statistics.median(seconds),
        cpu_s_per_gb=cpu_s / (gigabytes * len(seconds)),
        foreign_cores=max(0.0, foreign_s / wall_s),
    )


def undisturbed(contender: Contender, slice_s: float) -> Slice:
    """The first slice without much foreign load, else the one with the least."""
    tries: list[Slice] = []
    for _ in range(_TRIES):
        tries.append(take(contender, slice_s))
        if tries[-1].foreign_cores <= FOREIGN_CORES:
            break
    return min(tries, key=lambda one: one.foreign_cores)


def compete(makers: Iterable[Callable[[], Contender]], *, rounds: int, slice_s: float) -> dict[str, Series]:
    """By name. One that cannot be started, or fails, is left out of the result's rounds and says why."""
    contenders: list[Contender] = []
    found: dict[str, Series] = {}
    try:
        for make in makers:
            try:
                contenders.append(make())
                contenders[-1].freeze()
            except RemoteFailed as error:
                print(f"  left out: {_last_line(error)}", flush=True)
        found = {contender.name: Series(contender.name) for contender in contenders}
        for _ in range(rounds):
            for contender in contenders:
                _round(contender, found[contender.name], slice_s)
        for contender in contenders:
            contender.thaw()
            if not found[contender.name].failure and not contender.verify():
                found[contender.name].failure = "wrong bytes arrived"
            contender.freeze()
    finally:
        for contender in contenders:
            contender.close()
    return {name: series for name, series in found.items() if series.slices}


def _round(contender: Contender, series: Series, slice_s: float) -> None:
    if series.failure:
        return
    try:
        series.slices.append(undisturbed(contender, slice_s))
    except RemoteFailed as error:
        series.failure = _last_line(error)
        print(f"  {contender.name}: {series.failure}", flush=True)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def add_row(
    report: Report, title: str, found: dict[str, Series], value: str, ceiling: str = "", goal: float | None = None
) -> None:
    """Nothing when one of them could not be measured; a failure is told, and then no goal is met."""
    if value not in found or (ceiling and ceiling not in found):
        return
    series = found[value]
    if not ceiling:
        report.add(Row(name=title, value=series.gbps, unit="GB/s", note=series.failure or series.note))
        return
    ratios = [(one.gbps / other.gbps, one, other) for one, other in pairs(series, found[ceiling])]
    _, one, other = sorted(ratios, key=lambda ratio: ratio[0])[len(ratios) // 2]
    note = "; ".join(filter(None, (series.failure, series.note)))
    row = Row(
        name=title, value=0.0 if series.failure else one.gbps, unit="GB/s", ceiling=other.gbps, ceiling_name=ceiling,
        goal=goal, note=note,
    )  # fmt: skip
    report.add(row)


def pairs(one: Series, other: Series) -> Sequence[tuple[Slice, Slice]]:
    """Of the same rounds."""
    return list(zip(one.slices, other.slices, strict=False))
