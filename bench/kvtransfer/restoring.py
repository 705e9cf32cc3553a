"""Rows of storage tiers: time to the first token when the prompt's KV is in host memory, against computing it.

The model is tiny, so computing is as cheap as it gets and the bytes per token are few: on a real one the tier wins by
more. The engine, the filler and the tiers are those of a worker.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.ids import PageHash, PageId
from baton_engine.config import EngineConfig
from baton_engine.exec.cpu import available_bytes
from baton_engine.exec.device import Fence, open_device
from baton_engine.request import Request
from baton_engine.role import TokenOut
from baton_kvtransfer.blocks import HostBlocks
from baton_kvtransfer.tiers import TierConfig
from baton_proto.common_pb2 import Compat
from baton_worker.filling import Filler
from baton_worker.storage import Storage, open_storage
from bench.engine import Bench, StopWatch
from bench.report import Report, Row

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64, "hidden_size": 256,
    "intermediate_size": 688, "max_position_embeddings": 4096, "num_attention_heads": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "vocab_size": 2048, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
}  # fmt: skip
LENGTHS = (64, 128, 256, 512, 1024, 2048)
GOAL_FROM_TOKENS = 256
PAGE_TOKENS = 64
POOL_PAGES = 40  # hardly more than the longest prompt: others push it out
REPEATS = 3


class TieredRole(StopWatch):
    """Asks the tiers before a prompt is computed, and gives them every complete page."""

    storage: Storage
    filler: Filler
    cached_tokens = 0

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        super().on_tokens(step, tokens)
        self.cached_tokens = tokens[0].cached_tokens or 0

    def wants_fill(self, request: Request) -> bool:
        return self.filler.wants(request)

    def on_fill(self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int) -> None:
        self.filler.begin(request, pages, hashes, have_tokens)

    def wants_pages(self) -> bool:
        return True

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        return self.storage.keep_pages(hashes, pages)

    def release_kv(self, request: Request, error: Exception | None) -> Fence:
        return self.filler.stop(request.request_id)


def measure(report: Report, seconds: float) -> None:
    role = TieredRole()
    config = EngineConfig(
        dtype="float32", page_tokens=PAGE_TOKENS, context_tokens=max(LENGTHS) + PAGE_TOKENS, step_tokens=512,
        pages=POOL_PAGES,
    )  # fmt: skip

    def begin(bench: Bench) -> None:
        pool = bench.engine.pool
        storage = open_storage(
            TierConfig(host_bytes=1 << 30), compat=Compat(), layout=pool.layout, pool_pages=pool.pages,
            blocks=HostBlocks(pool.tensor, pool.layout), host="127.0.0.1", free_bytes=available_bytes(),
            clock=SystemClock(), registry=CollectorRegistry(),
        )  # fmt: skip
        assert storage is not None, "host memory was asked for"
        role.storage = storage
        role.filler = Filler(engine=bench.engine, sources=[storage.source()], page_tokens=PAGE_TOKENS)

    bench = Bench(SHAPE, open_device("cpu", threads=1), config, watch=role, before_start=begin)
    try:
        _rows(report, bench, role)
    finally:
        bench.close()
        role.storage.close()
        del bench
        gc.collect()


def _rows(report: Report, bench: Bench, role: TieredRole) -> None:
    chance = random.Random(5)

    def prompt(tokens: int) -> list[int]:
        return [chance.randrange(SHAPE["vocab_size"]) for _ in range(tokens)]

    computed: dict[int, list[float]] = {length: [] for length in LENGTHS}
    restored: dict[int, list[float]] = {length: [] for length in LENGTHS}
    cached: dict[int, int] = {}
    _seconds(bench, prompt(max(LENGTHS)))  # the first pass touches memory
    for _ in range(REPEATS):
        prompts = {length: prompt(length) for length in LENGTHS}
        for length in LENGTHS:
            computed[length].append(_seconds(bench, prompts[length]))
        for _ in range(2):
            _seconds(bench, prompt(max(LENGTHS)))
        for length in LENGTHS:
            restored[length].append(_seconds(bench, prompts[length]))
            cached[length] = role.cached_tokens
    for length in LENGTHS:
        compute_s, restore_s = statistics.median(computed[length]), statistics.median(restored[length])
        goal = 1.0 if length >= GOAL_FROM_TOKENS else None
        note = f"{restore_s * 1e3:.1f} against {compute_s * 1e3:.1f} ms, {cached[length]} tokens restored"
        if length >= GOAL_FROM_TOKENS and cached[length] < length - PAGE_TOKENS:
            compute_s, note = 0.0, f"only {cached[length]} tokens came from the tier"
        report.add(
            Row(name=f"first token from host memory, {length} tokens", value=compute_s / restore_s, unit="x computed",
                goal=goal, note=note)
        )  # fmt: skip


def _seconds(bench: Bench, tokens: list[int]) -> float:
    begin_s = time.perf_counter()
    bench.submit_tokens(tokens, 1)
    bench.watch.wait(1)
    return time.perf_counter() - begin_s
