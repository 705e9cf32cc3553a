"""Rows of the kernel benchmark: one line each as it comes, and a JSON document beside that is whole after every row."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from bench.gpu.timing import Timing

NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One case on one implementation. Without `timing` it was not run, and `note` says why."""

    op: str
    case: str
    implementation: str
    dtype: str
    bytes: int
    flops: int
    goal: float | None  # least fraction of the floor
    limit_s: float | None = None  # most time, for a call that is so small that its fraction says nothing
    held_bytes: int | None = None  # of one set of inputs
    floor_s: float | None = None
    bound: str = ""  # mem or comp
    timing: Timing | None = None
    launch_s: float | None = None  # of the host, outside a graph
    failed: bool = False  # it should have run
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """Of the floor."""
        return None if self.timing is None or self.floor_s is None else self.floor_s / self.timing.p50_s

    @property
    def verdict(self) -> str:
        if self.failed:
            return "ERROR"
        if self.fraction is None or self.timing is None:
            return NOT_RUN
        if self.goal is not None:
            return "PASS" if self.fraction >= self.goal else "FAIL"
        if self.limit_s is not None:
            return "PASS" if self.timing.p50_s <= self.limit_s else "FAIL"
        return ""

    @property
    def wanted(self) -> str:
        """The goal in words."""
        if self.goal is not None:
            return f"{self.goal:.2f}"
        return "" if self.limit_s is None else f"{self.limit_s * 1e6:.0f} µs"


COLUMNS = (
    ("op", 14), ("case", 44), ("with", 11), ("dtype", 9), ("GB", 9), ("TFLOP", 8), ("holds GB", 8), ("floor µs", 14),
    ("p50 µs", 10), ("p10-p90", 19), ("GB/s", 7), ("TFLOP/s", 8), ("fraction", 9), ("goal", 5), ("", 8),
    ("launch µs", 10), ("note", 0),
)  # fmt: skip
_LEFT = {"op", "case", "with", "dtype", "note", ""}


def cells(row: KernelRow) -> tuple[str, ...]:
    """In the order of COLUMNS; empty where there is nothing to say."""
    timing, us = row.timing, 1e6
    timed = ("", "", "", "")
    if timing is not None:
        timed = (
            f"{timing.p50_s * us:.1f}",
            f"{timing.p10_s * us:.1f}-{timing.p90_s * us:.1f}",
            f"{row.bytes / timing.p50_s / 1e9:.0f}",
            f"{row.flops / timing.p50_s / 1e12:.1f}",
        )
    return (
        row.op, row.case, row.implementation, row.dtype, f"{row.bytes / 1e9:.4f}", f"{row.flops / 1e12:.3f}",
        "" if row.held_bytes is None else f"{row.held_bytes / 1e9:.3f}",
        "" if row.floor_s is None else f"{row.floor_s * us:.1f} {row.bound}",
        *timed,
        "" if row.fraction is None else f"{row.fraction:.2f}",
        row.wanted,
        row.verdict,
        "" if row.launch_s is None else f"{row.launch_s * us:.1f}",
        row.note,
    )  # fmt: skip


def line(texts: tuple[str, ...]) -> str:
    padded = (
        text.ljust(width) if name in _LEFT else text.rjust(width)
        for text, (name, width) in zip(texts, COLUMNS, strict=True)
    )
    return " ".join(padded).rstrip()


@dataclass(slots=True, kw_only=True)
class KernelReport:
    """Prints as it goes."""

    provenance: Mapping[str, object]
    settings: Mapping[str, object]
    path: Path | None = None  # of the JSON document
    out: TextIO = field(default_factory=lambda: sys.stdout)
    rows: list[KernelRow] = field(default_factory=list)
    ceilings: Mapping[str, float | None] | None = None

    def begin(self, ceilings: Mapping[str, float | None] | None) -> None:
        """None: nothing was measured."""
        self.ceilings = ceilings
        for name, value in self.provenance.items():
            self._say(f"{name}: {value}")
        for name, value in (ceilings or {"ceilings": None}).items():
            self._say(f"{name}: {NOT_RUN if value is None else f'{value:.0f}'}")
        self._say(line(tuple(name for name, _ in COLUMNS)))

    def add(self, row: KernelRow) -> None:
        self.rows.append(row)
        self._say(line(cells(row)))
        self.write()

    def end(self) -> None:
        verdicts = [row.verdict for row in self.rows]
        counts = ", ".join(f"{verdicts.count(word)} {word or 'without a goal'}" for word in dict.fromkeys(verdicts))
        self._say(f"{len(self.rows)} rows: {counts or 'nothing'}")
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        rows = [asdict(row) | {"fraction": row.fraction, "verdict": row.verdict} for row in self.rows]
        document = {
            "title": "kernels",
            "provenance": dict(self.provenance),
            "settings": dict(self.settings),
            "ceilings": self.ceilings,
            "rows": rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1, default=str) + "\n")

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()
