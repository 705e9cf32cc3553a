"""Prefill and decode of one engine, in this process, against what `F.linear` reaches here in the same run."""

from __future__ import annotations

import gc
import itertools
import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.config import EngineConfig
from baton_engine.engine import Engine
from baton_engine.exec.device import Device, Fence, open_device
from baton_engine.models.families import parse_config
from baton_engine.models.fields import Fields
from baton_engine.models.loader import random_model
from baton_engine.request import Mode, Request, SamplingParams
from baton_engine.role import TokenOut
from baton_engine.step import StepPlan
from bench.ceilings import gemm_tflops, linear_gbps
from bench.models import QWEN3_0_6B, flops_per_prompt_token, linear_shapes
from bench.report import Report, Row

PROMPT_TOKENS = 1024
DECODE_CONTEXT = 128
BATCHES = (1, 8, 32)
Dtype = Literal["bfloat16", "float32"]
BYTES: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}


class StopWatch:
    """A role that only notes when tokens come and requests end."""

    def __init__(self) -> None:
        self.ended: queue.SimpleQueue[BatonError | None] = queue.SimpleQueue()
        self.steps: list[tuple[float, int]] = []  # (seconds, tokens)

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self.steps.append((time.perf_counter(), len(tokens)))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        self.ended.put(error)

    def wait(self, requests: int, timeout_s: float = 900.0) -> None:
        for _ in range(requests):
            error = self.ended.get(timeout=timeout_s)
            if error is not None:
                raise error

    def wants_fill(self, request: Request) -> bool:
        return False

    def on_fill(
        self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int
    ) -> None: ...
    def wants_pages(self) -> bool:
        return False

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None: ...
    def unsent_tokens(self) -> int:
        return 0

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None: ...
    def on_local(self, request: Request) -> None: ...
    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None: ...
    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None: ...
    def on_prefill_done(self, request: Request, first: TokenOut) -> None: ...
    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None: ...
    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        raise AssertionError("local requests hand nothing over")


class Bench:
    """One engine on random weights of a model's shape and the requests that measure it. Closes its device."""

    def __init__(
        self,
        shape: Mapping[str, Any],
        device: Device,
        config: EngineConfig,
        *,
        watch: StopWatch | None = None,
        before_start: Callable[[Bench], None] = lambda bench: None,
    ) -> None:
        spec = parse_config(Fields(shape, "benchmark shape"))
        self.watch = watch or StopWatch()
        self.device = device
        model = random_model(spec, seed=0, device=device, dtype=config.dtype)
        self.engine = Engine(model, config, device, self.watch, SystemClock(), _crash)
        before_start(self)
        self.engine.start()
        self._vocab = spec.vocab_size
        self._random = random.Random(0)
        self._count = 0

    def close(self) -> None:
        self.engine.stop()
        self.device.close()

    def submit(self, prompt_tokens: int, outputs: int) -> None:
        self.submit_tokens([self._random.randrange(self._vocab) for _ in range(prompt_tokens)], outputs)

    def submit_tokens(self, prompt: list[int], outputs: int) -> None:
        self._count += 1
        now_s = time.monotonic()
        self.engine.submit(
            Request(
                request_id=RequestId(f"bench-{self._count}"),
                mode=Mode.LOCAL,
                tokens=prompt,
                prompt_tokens=len(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True),
                deadline_s=now_s + 3600,
                arrival_s=now_s,
            )
        )

    def prefill_s(self, prompt_tokens: int, repeats: int) -> float:
        """Best time from submission of one prompt to its first token."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.submit(prompt_tokens, 1)
            self.watch.wait(1)
            times.append(time.perf_counter() - start)
        return min(times)

    def decode_step_s(self, batch: int, steps: int, context: int) -> float:
        """Median time between two steps in which all `batch` requests with prompts of `context` tokens got a token."""
        self.watch.steps.clear()
        for _ in range(batch):
            self.submit(context, steps)
        self.watch.wait(batch)
        full = [stamp for stamp, tokens in self.watch.steps if tokens == batch]
        gaps = sorted(after - before for before, after in itertools.pairwise(full))
        return gaps[len(gaps) // 2]


def _on_cpu(dtype: Dtype, threads: int) -> Bench:
    config = EngineConfig(dtype=dtype, context_tokens=2048, max_rows=64, step_tokens=1024, pages=256)
    return Bench(QWEN3_0_6B, open_device("cpu", threads=threads), config)


def _crash(error: BaseException, dump: Mapping[str, object]) -> None:
    raise SystemExit(f"the engine failed: {error}")


def measure(report: Report, dtype: Dtype, threads: int, *, quick: bool = False) -> None:
    """Adds one row for prefill and one per decode batch size."""
    torch_dtype = getattr(torch, dtype)
    shapes = linear_shapes(QWEN3_0_6B)
    weight_bytes = BYTES[dtype] * sum(out * into for out, into in shapes)
    bench = _on_cpu(dtype, threads)
    try:
        tflops = bench.device.run(lambda: gemm_tflops(torch_dtype))
        seconds = bench.prefill_s(PROMPT_TOKENS, 1 if quick else 2)
        reached = flops_per_prompt_token(QWEN3_0_6B, PROMPT_TOKENS) * PROMPT_TOKENS / seconds / 1e12
        report.add(
            Row(name=f"prefill {PROMPT_TOKENS}, {dtype}", value=reached, unit="TFLOP/s", ceiling=tflops,
                ceiling_name="2048³ GEMM", goal=0.45, note=f"{PROMPT_TOKENS / seconds:.0f} tok/s")
        )  # fmt: skip
        for batch in BATCHES:
            gbps = bench.device.run(partial(linear_gbps, shapes, batch, torch_dtype, repeats=1 if quick else 2))
            step_s = bench.decode_step_s(batch, 8 if quick else 16, DECODE_CONTEXT)
            report.add(
                Row(name=f"decode batch {batch}, {dtype}", value=batch / step_s, unit="tok/s",
                    ceiling=batch * gbps * 1e9 / weight_bytes, ceiling_name=f"F.linear at {gbps:.1f} GB/s", goal=0.60,
                    note=f"context {DECODE_CONTEXT}, step {step_s * 1e3:.0f} ms")
            )  # fmt: skip
    finally:
        bench.close()
        del bench
        gc.collect()  # engine and role know each other: without this gigabytes wait for a collection of small objects


def prefill_alone_s(dtype: Dtype, *, threads: int, prompt_tokens: int) -> float:
    """What one engine without any service around it needs for a prompt: the ceiling of TTFT."""
    bench = _on_cpu(dtype, threads)
    try:
        return bench.prefill_s(prompt_tokens, 3)
    finally:
        bench.close()
        del bench
        gc.collect()  # engine and role know each other: without this gigabytes wait for a collection of small objects
