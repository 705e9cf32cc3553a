"""Inputs of paged attention: a pool full of NaN with rows on shuffled pages, what a call must at least move, and the
shapes of real models that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton_kernels.attention.shape import TREE_TOKENS, AttentionShape, Rows, Scores
from baton_kernels.capabilities import Capabilities
from baton_kernels.quant import fp8_max
from baton_kernels.registry import Call, Case, Traffic

FP8_FACTORS = (0.05, 0.02)
PIECE_PAGES = 512  # of a large pool that are made at once


def shape_of(
    heads: int, kv_heads: int, dim: int, page_tokens: int = 64, layers: int = 2, **rest: Any
) -> AttentionShape:
    """Of a pool [page, layer, kv, head, token, dim] without gaps; bfloat16 unless said otherwise."""
    head = page_tokens * dim
    strides = (layers * 2 * kv_heads * head, kv_heads * head, head, dim)
    dtype = rest.pop("dtype", torch.bfloat16)
    return AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_tokens=page_tokens,
        dtype=dtype,
        kv_dtype=rest.pop("kv_dtype", dtype),
        kv_strides=strides,
        **rest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of a step as (query tokens, KV tokens), and the layer's window."""

    rows: tuple[tuple[int, int], ...]
    window: int | None = None

    @property
    def tokens(self) -> int:
        return sum(queries for queries, _ in self.rows)


def model(shape: AttentionShape, batch: Batch) -> Traffic:
    """Reads what each row sees of K and V once for each KV head, and the queries; writes the output."""
    window = batch.window or 1 << 62
    read = pairs = 0
    for queries, tokens in batch.rows:
        position = np.arange(tokens - queries, tokens)
        pairs += int(np.minimum(position + 1, window).sum())
        read += min(tokens, window + queries - 1) if queries else 0
    factors = 4 if shape.factors == 4 else 0
    kv = read * shape.kv_heads * 2 * (shape.dim * shape.kv_dtype.itemsize + factors)
    activations = 2 * batch.tokens * shape.heads * shape.dim * shape.dtype.itemsize
    return Traffic(bytes=kv + activations, flops=4 * pairs * shape.heads * shape.dim)


def _pool(shape: AttentionShape, pages: int, device: torch.device) -> Tensor:
    """A layer's view of a pool in which no byte may be used."""
    layers = shape.kv_strides[0] // (2 * shape.kv_strides[1])
    size = pages, layers, 2, shape.kv_heads, shape.page_tokens, shape.dim
    if shape.kv_dtype is torch.int8:
        pool = torch.full(size, 127, dtype=torch.int8, device=device)
    elif shape.factors:
        pool = torch.full(size, 0x7F, dtype=torch.uint8, device=device).view(shape.kv_dtype)
    else:
        pool = torch.full(size, float("nan"), dtype=shape.kv_dtype, device=device)
    return pool[:, layers - 1]


def _fill(kv: Tensor, scales: Tensor | None, owned: Sequence[tuple[Tensor, int]], random: torch.Generator) -> None:
    """Random K and V into each row's own tokens: (its pages, its count of tokens)."""
    _, _, heads, page_tokens, dim = kv.shape
    for pages, tokens in owned:
        for first in range(0, tokens, page_tokens * PIECE_PAGES):
            count = min(tokens - first, page_tokens * PIECE_PAGES)
            at = torch.arange(first, first + count)
            values = torch.randn(count, 2, heads, dim, generator=random).to(kv.device)
            page, offset = pages[at // page_tokens].to(kv.device), (at % page_tokens).to(kv.device)
            if scales is not None and scales.dim() == 4:
                factors = values.abs().amax(-1) / 127
                scales[page, :, :, offset] = factors
                values = (values / factors.unsqueeze(-1)).round()
            elif scales is not None:
                largest = fp8_max(kv.dtype)
                values = (values / scales.view(2, 1, 1)).clamp(-largest, largest)
            kv[page, :, :, offset] = values.to(kv.dtype)


def _tree(batch: Batch, random: torch.Generator) -> Tensor:
    """int64[T]: a random tree over the queries of each short row; long rows are plainly causal."""
    masks = []
    for queries, _ in batch.rows:
        seen = np.zeros((queries, queries), np.uint64)
        for node in range(queries):
            parent = int(torch.randint(-1, node, (), generator=random)) if node else -1
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = 1
        if queries <= TREE_TOKENS:
            packed = (seen << np.arange(queries, dtype=np.uint64)).sum(1, dtype=np.uint64).astype(np.int64)
            masks.append(torch.from_numpy(packed))
        else:
            masks.append(torch.full((queries,), -1, dtype=torch.int64))
    return torch.cat(masks)


def make(shape: AttentionShape, batch: Batch, random: torch.Generator, device: torch.device) -> Call:
    """The call. Page tables point at a page of NaN behind each row's own."""
    counts = [-(-tokens // shape.page_tokens) for _, tokens in batch.rows]
    order = torch.randperm(sum(counts), generator=random, dtype=torch.int32)
    table = torch.full((len(counts), max(counts, default=0) + 1), sum(counts), dtype=torch.int32)
    owned, used = [], 0
    for index, count in enumerate(counts):
        table[index, :count] = order[used : used + count]
        owned.append((table[index, :count].long(), batch.rows[index][1]))
        used += count
    kv = _pool(shape, sum(counts) + 1, device)
    scales = None
    if shape.factors == 4:
        scales = torch.full(kv.shape[:4], float("nan"), device=device)
    elif shape.factors == 1:
        scales = torch.tensor(FP8_FACTORS, device=device)
    _fill(kv, scales, owned, random)
    cu_q = (0, *np.cumsum([queries for queries, _ in batch.rows]).tolist())
    kv_lens = tuple(tokens for _, tokens in batch.rows)
    fused = torch.randn(batch.tokens, shape.heads + 2 * shape.kv_heads, shape.dim, generator=random)
    arguments: dict[str, Any] = {
        "q": fused.to(shape.dtype).to(device)[:, : shape.heads],
        "kv": kv,
        "plan": Rows(
            page_table=table.to(device),
            cu_q=torch.tensor(cu_q, dtype=torch.int32, device=device),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            cu_q_host=cu_q,
            kv_lens_host=kv_lens,
        ),
        "scores": Scores(
            scale=shape.dim**-0.5,
            window=batch.window,
            softcap=shape.softcap,
            sinks=torch.randn(shape.heads, generator=random).to(device) if shape.sinks else None,
        ),
        "kv_scales": scales,
        "tree": _tree(batch, random).to(device) if shape.tree else None,
        "out": torch.empty(batch.tokens, shape.heads, shape.dim, dtype=shape.dtype, device=device),
        "lse": torch.empty(batch.tokens, shape.heads, device=device),
    }
    return Call(arguments=arguments, outputs=("out", "lse"), precision=shape.dtype)


def _small() -> list[tuple[str, AttentionShape, Batch]]:
    """Small enough for the interpreter: page borders, all features, all storage formats, every class of tile."""
    borders = Batch(rows=((1, 1), (1, 15), (1, 16), (0, 20), (1, 17), (1, 65)))
    mixed = Batch(rows=((1, 40), (37, 37), (0, 0), (20, 90)))
    half: dict[str, Any] = {"dtype": torch.float16}
    single: dict[str, Any] = {"dtype": torch.float32}
    return [
        ("decode", shape_of(4, 2, 64, 16), borders),
        ("split", shape_of(2, 1, 64, **half), Batch(rows=((1, 700), (1, 5), (2, 300)))),
        ("decode-window", shape_of(4, 2, 128, 32, **single, sinks=True), replace(borders, window=7)),
        ("split-window", shape_of(4, 1, 64, **half, sinks=True), Batch(rows=((1, 650), (3, 400)), window=350)),
        ("verify", shape_of(16, 2, 64, 32, **half, softcap=3.0), Batch(rows=((5, 70), (1, 1), (16, 40)))),
        ("many-heads", shape_of(24, 1, 64, 16), Batch(rows=((1, 30), (3, 33)))),
        ("mixed", shape_of(4, 2, 64), mixed),
        ("mixed-page-128", shape_of(2, 2, 64, 128, **single), replace(mixed, window=20)),
        ("extend-split", shape_of(2, 1, 64, 16, **half), Batch(rows=((17, 300),))),
        ("extend-window", shape_of(2, 1, 96, 32, sinks=True), Batch(rows=((70, 200), (17, 17)), window=50)),
        ("padded-80", shape_of(2, 1, 80, 64, **half), mixed),
        ("wide-256", shape_of(2, 1, 256, 64, softcap=5.0), Batch(rows=((1, 70), (18, 70)))),
        ("page-48", shape_of(4, 2, 64, 48, **half), mixed),
        ("tree", shape_of(4, 2, 64, 32, **single, tree=True), Batch(rows=((7, 90), (12, 12), (1, 33)), window=64)),
        ("tree-bits", shape_of(2, 1, 64, 64, tree=True), Batch(rows=((64, 80), (70, 70)), window=65)),
        ("fp8", shape_of(4, 2, 64, kv_dtype=torch.float8_e4m3fn), mixed),
        ("fp8-decode", shape_of(4, 2, 128, 16, **half, kv_dtype=torch.float8_e4m3fn), borders),
        ("int8", shape_of(4, 2, 64, 32, kv_dtype=torch.int8), mixed),
        ("int8-split", shape_of(2, 1, 64, 64, **half, kv_dtype=torch.int8), Batch(rows=((2, 600),))),
        ("nothing", shape_of(4, 2, 64), Batch(rows=((0, 5), (0, 0)))),
    ]


def _large() -> list[tuple[str, AttentionShape, Batch, float | None]]:
    """Llama's heads: 32 queries, 8 KV, 128 wide, one layer."""
    llama = partial(shape_of, 32, 8, 128, layers=1)
    found: list[tuple[str, AttentionShape, Batch, float | None]] = []
    for tokens, goal in ((4, 0.85), (16, 0.90), (64, 0.92)):
        batch = Batch(rows=((1, tokens * 1024),) * 64)
        found.append((f"decode-b64-{tokens}k", llama(), batch, goal))
        found.append((f"decode-b64-{tokens}k-fp8", llama(kv_dtype=torch.float8_e4m3fn), batch, 0.75))
        found.append((f"decode-b64-{tokens}k-int8", llama(kv_dtype=torch.int8), batch, 0.80))
    for rows, goal in ((1, 0.70), (8, 0.85)):
        found.append((f"decode-b{rows}-64k", llama(), Batch(rows=((1, 65536),) * rows), goal))
    found.append(("verify-b64-4k-q4", llama(), Batch(rows=((4, 4096),) * 64), None))
    for tokens, goal in ((2, 0.45), (4, 0.56), (8, 0.60), (16, 0.62), (32, 0.62)):
        found.append((f"prefill-{tokens}k", llama(), Batch(rows=((tokens * 1024,) * 2,)), goal))
    found.append(("extend-512-on-16k", llama(), Batch(rows=((512, 16384 + 512),)), None))
    return found


def cases() -> Sequence[Case[AttentionShape]]:
    """See `_small` and `_large`."""
    small = [_case(name, shape, batch) for name, shape, batch in _small()]
    return small + [_case(name, shape, batch, bench=True, goal=goal) for name, shape, batch, goal in _large()]


def _case(
    name: str, shape: AttentionShape, batch: Batch, *, bench: bool = False, goal: float | None = None
) -> Case[AttentionShape]:
    return Case(
        name=f"{name}-{str(shape.dtype).removeprefix('torch.')}",
        shape=shape,
        make=partial(make, shape, batch),
        traffic=model(shape, batch),
        bench=bench,
        goal=goal,
    )


def shapes(capabilities: Capabilities) -> Sequence[AttentionShape]:
    """Llama, also with drafts in a tree and with narrow KV; Phi on small pages; Gemma 2; gpt-oss."""
    llama = partial(shape_of, 32, 8, 128, layers=32)
    found = [
        llama(),
        llama(tree=True),
        llama(kv_dtype=torch.int8),
        shape_of(32, 32, 96, 16, layers=32),
        shape_of(16, 8, 256, layers=42, softcap=50.0),
        shape_of(64, 8, 64, layers=36, sinks=True),
    ]
    if capabilities.fp8 is not None:
        found.append(llama(kv_dtype=capabilities.fp8))
    return found
