"""KV handoff: value, ceiling, fraction, goal. `python -m bench.kvtransfer [seconds per row] [--only PART ...]`

Without --only it takes about six minutes. `make bench-kv` sets what it needs: PYTHONPATH=.:tests, OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

PARTS = {  # name -> module, function
    "wires": ("throughput", "wires"),
    "llama": ("throughput", "llama"),
    "small": ("small", "measure"),
    "exposed": ("exposed", "measure"),
    "planning": ("planning", "measure"),
    "peers-4k": ("throughput", "peers_4k"),
    "peers-64k": ("throughput", "peers_64k"),
    "peers-1m": ("throughput", "peers_1m"),
    "failures": ("failures", "measure"),
    "idle": ("failures", "idle"),
    "damage": ("damage", "measure"),
    "tiers": ("restoring", "measure"),
    "served": ("served", "measure"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kvtransfer", description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=1.0, help="per row")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="write the rows as JSON, too")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by every process that is started
    from bench.report import Report  # noqa: PLC0415 - loads torch, after that

    report = Report(title="KV handoff", settings={"seconds_per_row": options.seconds, "parts": options.only or "all"})
    begin_s = time.perf_counter()
    for name, (module, function) in PARTS.items():
        if options.only is None or name in options.only:
            report.console.print(f"{name} ({time.perf_counter() - begin_s:.0f} s)")
            getattr(importlib.import_module(f"bench.kvtransfer.{module}"), function)(report, options.seconds)
    report.show()
    report.console.print(f"{time.perf_counter() - begin_s:.0f} s")
    if options.out:
        report.write(options.out)


if __name__ == "__main__":
    main()
