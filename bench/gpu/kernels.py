"""`python -m bench.gpu.kernels`: every family's large cases against the floors of this GPU, one line each.

Beside the implementation that the oracle chooses, those that run only where they are asked for by name. With
`--dry-run` nothing is computed and no GPU is needed: what would run where and why, with bytes, flops and memory.
It iterates over the families; it does not know any of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baton_kernels import oracle
from baton_kernels.capabilities import Capabilities, named, of_device
from baton_kernels.families import FAMILIES
from baton_kernels.library import Library
from baton_kernels.registry import Case, Family
from bench.gpu.card import Call, CudaGpu, Gpu, about
from bench.gpu.ceilings import Ceilings, measure_ceilings
from bench.gpu.inputs import SizeUnknown, argument_bytes, sets
from bench.gpu.table import KernelReport, KernelRow
from bench.gpu.timing import GRAPHED_S, Timing, measure

Families = Sequence[Family[Any, Any]]
ROW_S = 4.0  # most that one row may be measured
SPARE_BYTES = 1 << 30  # for workspaces and the allocator
LAUNCHES = 100  # for the mean of the host's time
SMALL_S, SMALL_LIMIT_S = 1.5e-6, 3e-6  # a call with such a floor is all latency: most time that it may take in a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A row before it is run."""

    family: Family[Any, Any]
    case: Case[Any]
    row: KernelRow
    runs: bool


def plan(families: Families, capabilities: Capabilities, device: torch.device) -> Iterator[Planned]:
    """Every large case on the implementation that the oracle chooses and on the optional ones that can run."""
    for family in families:
        optional = [one.name for one in family.implementations if one.optional]
        for case in (case for case in family.cases() if case.bench):
            for forced in (None, *optional):
                yield _planned(family, case, forced, capabilities, device)


def _planned(
    family: Family[Any, Any], case: Case[Any], forced: str | None, capabilities: Capabilities, device: torch.device
) -> Planned:
    row = KernelRow(
        op=family.op,
        case=case.name,
        implementation=forced or "",
        dtype=str(getattr(case.shape, "dtype", "")).removeprefix("torch."),
        bytes=case.traffic.bytes,
        flops=case.traffic.flops,
        goal=case.goal,
    )
    try:
        force = None if forced is None else {family.op: forced}
        chosen = oracle.choices(family, capabilities, case.shape, force)[0]
    except oracle.Unsupported as refused:
        return Planned(family=family, case=case, row=replace(row, note=str(refused)), runs=False)
    row = replace(row, implementation=chosen.implementation, note=chosen.reason)
    try:
        row = replace(row, held_bytes=argument_bytes(case, device))
    except SizeUnknown as unknown:
        row = replace(row, note=f"{row.note}; size unknown: {unknown}")
    return Planned(family=family, case=case, row=row, runs=True)


class Benchmark:
    """Times planned rows on one GPU, within a budget for all of them."""

    def __init__(
        self,
        gpu: Gpu,
        capabilities: Capabilities,
        ceilings: Ceilings,
        *,
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpu = gpu
        self._capabilities = capabilities
        self._ceilings = ceilings
        self._clock = clock
        self._end_s = clock() + budget_s

    def run(self, planned: Sequence[Planned], report: KernelReport) -> None:
        """Add a row for each. One that fails is a row too; what a broken device leaves undone is said."""
        broken = ""
        for index, one in enumerate(planned):
            left_s = (self._end_s - self._clock()) / (len(planned) - index)
            floor_s, bound = self._ceilings.floor(one.case.traffic)
            row = replace(one.row, floor_s=floor_s, bound=bound)
            if row.goal is None and floor_s <= SMALL_S:
                row = replace(row, limit_s=SMALL_LIMIT_S)
            if not one.runs or broken:
                report.add(replace(row, note=broken or row.note, failed=bool(broken)))
                continue
            if left_s <= 0.0:
                report.add(replace(row, note="the time is up: raise --budget-s, or choose with --op"))
                continue
            try:
                report.add(self._timed(one, row, min(left_s, ROW_S)))
            except Exception as error:  # whatever a kernel or the driver raises, the other rows are worth having
                report.add(replace(row, failed=True, note=_one_line(error)))
                broken = self._broken()

    def _timed(self, one: Planned, row: KernelRow, budget_s: float) -> KernelRow:
        free = self._gpu.free_bytes()
        if row.held_bytes is not None and row.held_bytes + SPARE_BYTES > free:
            return replace(row, note=f"needs {row.held_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        began_s = self._clock()
        made = sets(one.case, self._gpu.torch_device, row.held_bytes or one.case.traffic.bytes)
        calls: list[Call] = [partial(self._bound(one, row), **call.arguments) for call in made]
        spent_s = self._clock() - began_s
        assert row.floor_s is not None, "the plan was given its floors"
        timing = measure(self._gpu, calls, row.floor_s, max(budget_s - spent_s, budget_s / 4), self._clock)
        launch_s = self._gpu.launch_s(calls[0], LAUNCHES) if row.floor_s < GRAPHED_S else None
        return replace(row, timing=timing, launch_s=launch_s, note=_note(row.note, timing))

    def _bound(self, one: Planned, row: KernelRow) -> Any:
        """An operation for one set of inputs: it may hold what it planned for them, and a graph must not plan."""
        library = Library(self._capabilities, force={one.family.op: row.implementation})
        return library.bind(one.family, one.case.shape)

    def _broken(self) -> str:
        """Why nothing more can run; empty when the device still works."""
        try:
            self._gpu.free_bytes()
        except Exception as error:
            return f"after an earlier row: {_one_line(error)}"
        return ""


def _note(reason: str, timing: Timing) -> str:
    how = f"graph of {timing.calls}" if timing.calls > 1 else timing.note
    return "; ".join(part for part in (how, reason) if part)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def chosen_families(ops: Sequence[str] | None) -> Families:
    """By operation, all without. SystemExit for one that does not exist."""
    known = [family.op for family in FAMILIES]
    if unknown := [op for op in ops or () if op not in known]:
        raise SystemExit(f"no operation {', '.join(unknown)}; there are {', '.join(known)}")
    return [family for family in FAMILIES if ops is None or family.op in ops]


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 when a row that should run did not; a missed goal is a result."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernels", description=__doc__)
    parser.add_argument("--op", nargs="+", help="these operations only")
    parser.add_argument("--dry-run", action="store_true", help="compute nothing, on any machine")
    parser.add_argument("--target", default="sm_90", help="architecture that a dry run plans for")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=480.0, help="for all rows together")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    families = chosen_families(options.op)
    settings: Mapping[str, object] = {"ops": options.op, "budget_s": options.budget_s, "dry_run": options.dry_run}
    if options.dry_run:
        target = named(options.target)
        told = about(torch.device("cpu")) | {"device": f"none: dry run for {target.name}"}
        report = KernelReport(provenance=told, settings=settings, path=options.json)
        report.begin(None)
        for one in plan(families, target, torch.device("cuda")):
            report.add(one.row)
    else:
        device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
        report = KernelReport(provenance=about(device), settings=settings, path=options.json)
        gpu, capabilities = CudaGpu(device), of_device(device)
        began_s = time.monotonic()
        ceilings = measure_ceilings(gpu, capabilities)
        report.begin(asdict(ceilings))
        left_s = options.budget_s - (time.monotonic() - began_s)
        planned = list(plan(families, capabilities, device))
        Benchmark(gpu, capabilities, ceilings, budget_s=left_s).run(planned, report)
    report.end()
    return int(any(row.failed for row in report.rows))


if __name__ == "__main__":
    raise SystemExit(main())
