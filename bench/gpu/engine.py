"""`python -m bench.gpu.engine`: whole steps of an engine with random weights of Llama-3.1-8B's shape on one GPU.

Value, floor and fraction of decode steps by batch and context, and of prefill by length. Everything that a worker does
for a step is in the figure: planning, kernels, sampling, the copy of the token to the host. `--dry-run` prints the
floors that an H200's ceilings give.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baton_engine.config import EngineConfig
from baton_engine.exec.device import Device, open_device
from baton_kernels.capabilities import of_device
from bench.engine import Bench
from bench.gpu.card import CudaGpu, about
from bench.gpu.ceilings import Ceilings, measure_ceilings
from bench.gpu.floors import decode_floor_s, prefill_floor_s
from bench.models import LLAMA_3_1_8B
from bench.report import Report, Row

MODEL = "Llama-3.1-8B shape, random weights"
STEPS = 32  # measured of each decode row
SLACK_STEPS = 8  # of a batch that fills up: not every step is full of prompt tokens
CONFIG = EngineConfig(
    dtype="bfloat16", context_tokens=33 * 1024, max_rows=256, step_tokens=8192, max_queue=1024, max_reserved=256
)
H200 = Ceilings(copy_gbps=4300.0, bf16_tflops=790.0)
"""Read once off an H200; only dry runs use it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    batch: int
    context: int
    goal: float  # fraction of the floor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow:
    tokens: int
    goal: float | None


DECODES = (
    DecodeRow(batch=1, context=1024, goal=0.75),
    DecodeRow(batch=1, context=16384, goal=0.75),
    DecodeRow(batch=16, context=1024, goal=0.75),
    DecodeRow(batch=16, context=4096, goal=0.78),
    DecodeRow(batch=16, context=16384, goal=0.85),
    DecodeRow(batch=64, context=1024, goal=0.75),
    DecodeRow(batch=64, context=4096, goal=0.82),
    DecodeRow(batch=256, context=1024, goal=0.75),
)
PREFILLS = (
    PrefillRow(tokens=512, goal=None),
    PrefillRow(tokens=2048, goal=0.72),
    PrefillRow(tokens=8192, goal=0.70),
    PrefillRow(tokens=32768, goal=0.62),
)


class EngineBench:
    """One engine and the ceilings that judge it."""

    def __init__(
        self, shape: Mapping[str, Any], device: Device, config: EngineConfig, ceilings: Ceilings, *, end_s: float
    ) -> None:
        """`end_s`: monotonic time after which no further row is begun."""
        self._shape = shape
        self._config = config
        self._ceilings = ceilings
        self._end_s = end_s
        self._bench = Bench(shape, device, config)

    def close(self) -> None:
        self._bench.close()

    def measure(self, report: Report, decodes: Sequence[DecodeRow], prefills: Sequence[PrefillRow]) -> list[str]:
        """Adds a row for each that fits in the pool and in the time. Returns the others' names and reasons."""
        left_out = []
        self._bench.prefill_s(min(row.tokens for row in prefills), 1)  # the first step compiles
        for prefill in prefills:
            if self._late():
                left_out.append(f"prefill {prefill.tokens}: the time is up")
                continue
            report.add(self._prefill(prefill))
        for decode in decodes:
            name = f"decode batch {decode.batch}, context {decode.context}"
            pages = decode.batch * -(-(decode.context + self._outputs(decode)) // self._config.page_tokens)
            if pages > self._bench.engine.pool.pages:
                left_out.append(f"{name}: needs {pages} pages, the pool has {self._bench.engine.pool.pages}")
            elif self._late():
                left_out.append(f"{name}: the time is up")
            else:
                report.add(self._decode(name, decode))
        return left_out

    def _late(self) -> bool:
        return time.monotonic() > self._end_s

    def _prefill(self, row: PrefillRow) -> Row:
        spent_s = self._bench.prefill_s(row.tokens, 3)
        floor_s = prefill_floor_s(self._shape, row.tokens, self._ceilings)
        return Row(
            name=f"prefill {row.tokens}", value=row.tokens / spent_s, unit="tok/s", ceiling=row.tokens / floor_s,
            ceiling_name="sum of floors", goal=row.goal, note=f"{spent_s * 1e3:.1f} ms, floor {floor_s * 1e3:.1f} ms",
        )  # fmt: skip

    def _decode(self, name: str, row: DecodeRow) -> Row:
        outputs = self._outputs(row)
        step_s = self._bench.decode_step_s(row.batch, outputs, row.context)
        context = row.context + outputs // 2
        floor_s = decode_floor_s(self._shape, row.batch, context, self._ceilings)
        return Row(
            name=name, value=row.batch / step_s, unit="tok/s", ceiling=row.batch / floor_s,
            ceiling_name=f"sum of floors at {context} tokens", goal=row.goal,
            note=f"{step_s * 1e3:.2f} ms, floor {floor_s * 1e3:.2f} ms",
        )  # fmt: skip

    def _outputs(self, row: DecodeRow) -> int:
        """Tokens of each request: the first one still decodes when the last one has been prefilled."""
        filling = -(-row.batch * row.context // (self._config.step_tokens - row.batch))
        return filling + SLACK_STEPS + STEPS


def planned() -> list[str]:
    """What a dry run says."""
    shape = LLAMA_3_1_8B
    lines = [f"floors at {H200.copy_gbps:.0f} GB/s and {H200.bf16_tflops:.0f} TFLOP/s, not measured here; rows not run"]
    for one in PREFILLS:
        goal = "" if one.goal is None else f", goal {one.goal}"
        lines.append(f"prefill {one.tokens}: floor {prefill_floor_s(shape, one.tokens, H200) * 1e3:.1f} ms{goal}")
    for row in DECODES:
        floor_ms = decode_floor_s(shape, row.batch, row.context, H200) * 1e3
        lines.append(f"decode batch {row.batch}, context {row.context}: floor {floor_ms:.2f} ms, goal {row.goal}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.engine", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="compute nothing, on any machine")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=420.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print("\n".join(planned()))
        return
    began_s = time.monotonic()
    device = open_device(options.device)
    where = device.torch_device
    ceilings = device.run(lambda: measure_ceilings(CudaGpu(where), of_device(where)))
    torch.cuda.empty_cache()
    settings: dict[str, object] = {"model": MODEL, "ceilings": asdict(ceilings), "card": about(where)}
    report = Report(title="engine on a GPU", settings=settings)
    bench = EngineBench(LLAMA_3_1_8B, device, CONFIG, ceilings, end_s=began_s + options.budget_s)
    try:
        left_out = bench.measure(report, DECODES, PREFILLS)
    finally:
        bench.close()
    report.settings["left_out"] = left_out
    report.show()
    print("\n".join(left_out))
    if options.json is not None:
        report.write(options.json)


if __name__ == "__main__":
    main()
