"""What latent attention is compiled for, its torch reference, and inputs for its tests (DeepSeek-V2, arXiv 2405.04434).

"Absorbed": the projections of keys and values out of the latent are already multiplied into the queries and will be
multiplied into the output, so all heads share one KV head of 512 latent and 64 rotary numbers a token, and its values
are the first 512 of its keys. An 8-bit cache has one factor: value = code * factor.
The query tokens of a row are its last ones. What lies behind a row's last token in a page is never multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from baton_kernels.attention.partials import LOG2_E
from baton_kernels.attention.shape import Rows, Upload
from baton_kernels.attention.work import Capacity
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Traffic
from baton_kernels.rt.check import wide
from baton_kernels.rt.program import Program

LATENT = 512
ROPE = 64
WIDTH = LATENT + ROPE
LARGEST_TILE = 64  # packed queries
CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """One layer of one model on one pool."""

    heads: int
    page_tokens: int
    dtype: torch.dtype  # of queries and output
    kv_dtype: torch.dtype  # the same, or 8-bit floats
    kv_strides: tuple[int, int]  # elements from one page, one token to the next
    row_tokens: int = 1  # query tokens that a row brings as a rule; more are possible, and slower

    @property
    def tile(self) -> int:
        """Packed queries that are worth computing together."""
        return min(LARGEST_TILE, max(16, 1 << (self.heads * self.row_tokens - 1).bit_length()))

    @property
    def label(self) -> str:
        """What decides tile sizes: mixed tiles hold heads of several query tokens, and masks that differ by row."""
        return f"m{self.tile}" + "-mixed" * (self.heads % self.tile > 0) + "-fp8" * (self.kv_dtype in CODES)


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchLatent:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: LatentShape) -> None:
        self._shape = shape

    def plan(
        self,
        page_table: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        cu_q_host: Sequence[int],
        kv_lens_host: Sequence[int],
        *,
        upload: Upload | None = None,
        capacity: Capacity | None = None,
    ) -> Rows:
        """What a device prepares is not looked at."""
        del upload, capacity
        return Rows(page_table=page_table, cu_q=cu_q, kv_lens=kv_lens, cu_q_host=cu_q_host, kv_lens_host=kv_lens_host)

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        plan: Rows,
        scale: float,
        *,
        factor: float = 1.0,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of q [T, heads, 576] over one layer's kv [pages, 1, 1, page_tokens, 576].

        Writes `out` [T, heads, 512] (None: a new tensor) and returns it; lse float32[T, heads] receives the logarithm
        to base 2 of each query's sum of exp(score). Query tokens outside the plan's rows are left as they are.
        """
        dtype = wide(q.dtype)
        if out is None:
            out = torch.empty(*q.shape[:2], LATENT, dtype=q.dtype, device=q.device)
        for index, tokens in enumerate(plan.kv_lens_host):
            begin, end = plan.cu_q_host[index], plan.cu_q_host[index + 1]
            if begin == end:
                continue
            pages = plan.page_table[index, : -(-tokens // self._shape.page_tokens)].long()
            keys = kv[pages, 0, 0].reshape(-1, WIDTH)[:tokens].to(dtype) * factor
            raw = torch.einsum("qhd,kd->hqk", q[begin:end].to(dtype), keys) * scale
            position = torch.arange(tokens - (end - begin), tokens, device=q.device).unsqueeze(1)
            raw.masked_fill_(torch.arange(tokens, device=q.device) > position, float("-inf"))
            out[begin:end] = torch.einsum("hqk,kd->qhd", raw.softmax(-1), keys[:, :LATENT]).to(out.dtype)
            if lse is not None:
                lse[begin:end] = (raw.logsumexp(-1) * LOG2_E).T.to(lse.dtype)
        return out


# ---- floor and cases ------------------------------------------------------------------------------------------------
Batch = Sequence[tuple[int, int]]
"""(query tokens, KV tokens) of each row."""


def model(shape: LatentShape, batch: Batch) -> Traffic:
    """Reads each row's KV once and the queries, writes the output; multiplies keys by queries and values by weights."""
    pairs = sum(int(np.arange(tokens - queries + 1, tokens + 1).sum()) for queries, tokens in batch)
    read = sum(tokens for queries, tokens in batch if queries) * WIDTH * shape.kv_dtype.itemsize
    moved = sum(queries for queries, _ in batch) * shape.heads * (WIDTH + LATENT) * shape.dtype.itemsize
    return Traffic(bytes=read + moved, flops=2 * pairs * shape.heads * (WIDTH + LATENT))


def shape_of(
    heads: int,
    page_tokens: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    row_tokens: int = 1,
) -> LatentShape:
    """Of a pool [page, layer, 1, 1, token, 576] without gaps."""
    return LatentShape(
        heads=heads,
        page_tokens=page_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        kv_strides=(layers * page_tokens * WIDTH, WIDTH),
        row_tokens=row_tokens,
    )


def _pool(shape: LatentShape, owned: Sequence[tuple[Tensor, int]], pages: int, draw: partial[Tensor]) -> Tensor:
    """A layer's view of a pool of NaN, with numbers in each row's own tokens: (its pages, its tokens).

    Pages that are full repeat a few contents, in an order of their own: nobody draws gigabytes.
    """
    layers = shape.kv_strides[0] // (shape.page_tokens * WIDTH)
    pool = torch.full((pages, layers, 1, 1, shape.page_tokens, WIDTH), float("nan")).to(shape.kv_dtype)
    kv = pool[:, layers - 1]
    contents = draw(min(pages, 64), shape.page_tokens, WIDTH).to(shape.kv_dtype)
    for row, (mine, tokens) in enumerate(owned):
        for index, page in enumerate(mine.tolist()):
            held = min(tokens - index * shape.page_tokens, shape.page_tokens)
            kv[page, 0, 0, :held] = contents[(index * 7 + row) % len(contents), :held]
    return kv


def make(shape: LatentShape, batch: Batch, random: torch.Generator, device: torch.device) -> Call:
    """The call. Page tables point at a page of NaN behind each row's own; queries are a part of something wider."""
    draw = partial(torch.randn, generator=random, dtype=torch.float32)
    counts = [-(-tokens // shape.page_tokens) for _, tokens in batch]
    order = torch.randperm(sum(counts), generator=random, dtype=torch.int32)
    table = torch.full((len(counts), max(counts, default=0) + 1), sum(counts), dtype=torch.int32)
    owned, used = [], 0
    for index, count in enumerate(counts):
        table[index, :count] = order[used : used + count]
        owned.append((table[index, :count], batch[index][1]))
        used += count
    kv = _pool(shape, owned, sum(counts) + 1, draw)
    cu_q = (0, *np.cumsum([queries for queries, _ in batch]).tolist())
    kv_lens = tuple(tokens for _, tokens in batch)
    tokens = cu_q[-1]
    arguments = {
        "q": draw(tokens, shape.heads + 1, WIDTH).to(shape.dtype).to(device)[:, : shape.heads],
        "kv": kv.to(device),
        "plan": Rows(
            page_table=table.to(device),
            cu_q=torch.tensor(cu_q, dtype=torch.int32, device=device),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            cu_q_host=cu_q,
            kv_lens_host=kv_lens,
        ),
        "scale": (128 + ROPE) ** -0.5,
        "factor": 0.5 if shape.kv_dtype in CODES else 1.0,
        "out": torch.empty(tokens, shape.heads, LATENT, dtype=shape.dtype, device=device),
        "lse": torch.empty(tokens, shape.heads, device=device),
    }
    return Call(arguments=arguments, outputs=("out", "lse"), precision=shape.dtype)


def cases() -> Sequence[Case[LatentShape]]:
    """Page borders, split rows, several query tokens, heads that do not fill a tile, both storage formats."""
    half, fp8 = torch.float16, torch.float8_e4m3fn
    borders = ((1, 1), (1, 15), (1, 16), (0, 20), (1, 17), (1, 65))
    small: list[tuple[str, LatentShape, Batch]] = [
        ("decode", shape_of(16, 16), borders),
        ("decode-half", shape_of(16, 64, dtype=half), borders),
        ("many-heads", shape_of(128, dtype=half), ((1, 70), (1, 3))),
        ("few-heads", shape_of(20, 32), ((1, 33), (1, 2))),
        ("split", shape_of(16, dtype=half), ((1, 530), (1, 5))),
        ("split-verify", shape_of(16, 128, dtype=half, row_tokens=4), ((4, 520), (1, 300))),
        ("verify", shape_of(16, 16, row_tokens=4), ((5, 40), (16, 16), (2, 2), (0, 0))),
        ("page-48", shape_of(32, 48, dtype=half), ((1, 100), (2, 49))),
        ("fp8", shape_of(16, kv_dtype=fp8), borders),
        ("fp8-split", shape_of(64, dtype=half, kv_dtype=fp8), ((1, 400),)),
        ("nothing", shape_of(16), ((0, 5), (0, 0))),
    ]
    large = [
        (f"b64-{tokens}k" + "-fp8" * (kv_dtype is not None), shape_of(128, layers=1, kv_dtype=kv_dtype), tokens, goal)
        for tokens in (4, 16, 64)
        for kv_dtype, goal in ((None, 0.50), (fp8, None))
    ]
    found = [_case(name, shape, batch, bench=False, goal=None) for name, shape, batch in small]
    return found + [
        _case(name, shape, ((1, tokens * 1024),) * 64, bench=True, goal=goal) for name, shape, tokens, goal in large
    ]


def _case(name: str, shape: LatentShape, batch: Batch, *, bench: bool, goal: float | None) -> Case[LatentShape]:
    return Case(
        name=f"{name}-h{shape.heads}-{str(shape.dtype).removeprefix('torch.')}",
        shape=shape,
        make=partial(make, shape, batch),
        traffic=model(shape, batch),
        bench=bench,
        goal=goal,
    )


def shapes(capabilities: Capabilities) -> Sequence[LatentShape]:
    """DeepSeek's 128 heads on one, four and eight devices, one token and the verification of three drafts."""
    found = [shape_of(128), shape_of(32), shape_of(16), shape_of(16, row_tokens=4), shape_of(128, 16)]
    if capabilities.fp8 is not None:
        found += [shape_of(heads, kv_dtype=capabilities.fp8) for heads in (128, 32, 16)]
    return found
