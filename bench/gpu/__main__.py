"""`make gpu`: the tests marked gpu, then the benchmarks of kernels, engine and handoff, one document in bench/results.

Each part is a process of its own, so that one that breaks the device does not take the others with it, and has ten
minutes. `--dry-run` goes the same way without a GPU and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.card import about

PART_S = 600.0
RESULTS = Path("bench/results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    command: Sequence[str]
    writes: bool  # takes --json FILE


PARTS = (
    Part(name="tests", command=("pytest", "-m", "gpu", "-q", "-rs"), writes=False),
    Part(name="kernels", command=("bench.gpu.kernels",), writes=True),
    Part(name="engine", command=("bench.gpu.engine",), writes=True),
    Part(name="handoff", command=("bench.gpu.handoff",), writes=True),
)


def run(part: Part, folder: Path, *, dry: bool) -> dict[str, object]:
    """Output goes to the terminal. How it ended, and what it wrote."""
    command = [sys.executable, "-m", *part.command]
    path = folder / f"{part.name}.json"
    if dry:
        command += ["--dry-run"] if part.writes else ["--collect-only"]
    elif part.writes:
        command += ["--json", str(path)]
    print(f"== {part.name}: {' '.join(command[2:])}", flush=True)
    began_s = time.monotonic()
    try:
        status = subprocess.run(command, check=False, timeout=PART_S).returncode
    except subprocess.TimeoutExpired:
        status = -1
    found: dict[str, object] = {"status": status, "seconds": round(time.monotonic() - began_s, 1)}
    return found | ({"report": json.loads(path.read_text())} if path.exists() else {})


def file_name(card: str, date: str) -> str:
    """gpu-<device>-<date>.json"""
    plain = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia").removeprefix("amd")).strip("-")
    return f"gpu-{plain}-{date}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 when a part failed; a missed goal is a result."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU is visible to this process; --dry-run shows what would be done")
        return 1
    parts = [part for part in PARTS if options.parts is None or part.name in options.parts]
    with tempfile.TemporaryDirectory(prefix="baton-gpu-") as folder:
        found = {part.name: run(part, Path(folder), dry=options.dry_run) for part in parts}
    if not options.dry_run:
        card = about(torch.device("cuda", 0))
        path = RESULTS / file_name(str(card["device"]), time.strftime("%Y-%m-%d"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": "GPU", "provenance": card, **found}, indent=1) + "\n")
        print(f"written: {path}")
    for name, one in found.items():
        print(f"{name}: status {one['status']} after {one['seconds']} s")
    return int(any(one["status"] != 0 for one in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
