"""`make bench`: first-light figures of this machine. Parts: engine, service, memory; all without arguments.

The dtype of the figures is bfloat16; on a processor without bf16 units float32 rows stand beside them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from support.checkpoints import tiny_checkpoint

from bench import engine, service
from bench.ceilings import memmove_gbps
from bench.models import QWEN3_0_6B
from bench.report import Report, Row, provenance

DEMO = service.REPOSITORY / "demo_model" / "checkpoint"
HANDOVER_PROMPT_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help="engine, service or memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=sorted(engine.BYTES), help="measure this one only")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: to see that it works")
    parser.add_argument("--port", type=int, default=8790)
    name = time.strftime("first-light-%Y%m%d-%H%M.json")
    parser.add_argument("--out", type=Path, default=Path("bench/results") / name)
    options = parser.parse_args()
    parts = options.parts or ["engine", "service", "memory"]
    native = bool(provenance()["bf16_units"])
    dtypes = [options.dtype] if options.dtype else ["bfloat16"] if native else ["bfloat16", "float32"]
    settings = {"threads": options.threads, "dtypes": dtypes, "quick": options.quick}
    report = Report(title="first light", settings=settings)
    if "engine" in parts:
        report.add(Row(name="memmove", value=memmove_gbps(), unit="GB/s"))
        for dtype in dtypes:
            engine.measure(report, dtype, options.threads, quick=options.quick)
    if "service" in parts:
        dtype = dtypes[-1]
        alone_s = engine.prefill_alone_s(dtype, threads=1, prompt_tokens=HANDOVER_PROMPT_TOKENS)
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            model = tiny_checkpoint("qwen3", Path(folder) / "qwen3-0.6b-shape", dtype="bfloat16", **QWEN3_0_6B)
            flags = ("--dtype", dtype, "--context-tokens", "2048")
            with service.running(model, Path(folder), port=options.port, flags=flags) as house:
                count = 5 if options.quick else 15
                service.measure_handover(
                    report, house, prompt_tokens=HANDOVER_PROMPT_TOKENS, requests=count, alone_s=alone_s
                )
    if "memory" in parts:
        with (
            tempfile.TemporaryDirectory(prefix="baton-bench-") as folder,
            service.running(DEMO, Path(folder), port=options.port) as house,
        ):
            requests = 500 if options.quick else 5000
            service.measure_memory(report, house, requests=requests, warm_up=500)
    report.show()
    report.write(options.out)


if __name__ == "__main__":
    main()
