"""How every benchmark speaks: value, ceiling measured in the same run, fraction, goal. Nothing here measures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `goal` is the least fraction (or, without a ceiling, the most value) that counts as a pass."""

    name: str
    value: float
    unit: str
    ceiling: float | None = None
    ceiling_name: str = ""
    goal: float | None = None
    lower_is_better: bool = False
    note: str = ""

    @property
    def fraction(self) -> float | None:
        return self.value / self.ceiling if self.ceiling else None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        if self.fraction is not None:
            return "PASS" if self.fraction >= self.goal else "FAIL"
        return "PASS" if (self.value <= self.goal) == self.lower_is_better else "FAIL"


@dataclass(slots=True, kw_only=True)
class Report:
    """Rows of one run with its provenance; prints a table and writes JSON."""

    title: str
    settings: dict[str, object] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(width=150))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        fraction = "" if row.fraction is None else f" = {row.fraction:.2f} of {row.ceiling:.4g} ({row.ceiling_name})"
        line = f"  {row.name}: {row.value:.4g} {row.unit}{fraction} {row.verdict} {row.note}"
        self.console.print(line, soft_wrap=True)

    def show(self) -> None:
        table = Table(title=self.title)
        for column in ("what", "value", "unit", "ceiling", "of", "fraction", "goal", "", "note"):
            table.add_column(column)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.value:.4g}",
                row.unit,
                "" if row.ceiling is None else f"{row.ceiling:.4g}",
                row.ceiling_name,
                "" if row.fraction is None else f"{row.fraction:.2f}",
                "" if row.goal is None else f"{'≤' if row.lower_is_better else '≥'} {row.goal:g}",
                row.verdict,
                row.note,
            )
        self.console.print(table)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | {"fraction": row.fraction, "verdict": row.verdict} for row in self.rows]
        document = {"title": self.title, "provenance": provenance(), "settings": self.settings, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")


def provenance() -> dict[str, object]:
    """What a reader needs to judge a figure: processor, its bf16 units, load, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16_units": [name for name in ("avx512_bf16", "amx_bf16") if f" {name}" in cpuinfo],
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
