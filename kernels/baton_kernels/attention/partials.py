"""Reduction of partial attention states: what split-KV programs left in slots becomes the output of each query.

A state is (out, lse): attention over some of the KV tokens, normalised, float32, and the logarithm *to base 2* of the
sum of exp(score) over them. Nothing seen: lse = -inf, and out is zeros. States of disjoint tokens add up to
    lse = log2(sum 2^lse_i),  out = sum out_i 2^(lse_i - lse).
A sink takes weight and gives nothing; it is added here, once, since no partial state may hold it.
Records are `work.plan_work`'s reductions. It does not know KV or pages.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from baton_kernels.attention.work import Split, Tiling, pack, plan_work
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.check import check, wide
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer

LOG2_E = 1.4426950408889634
MAX_DIM = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialsShape:
    """States of `heads` query heads in `kv_heads` groups; the output is of `dtype`."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    sinks: bool = False

    @property
    def label(self) -> str:
        return f"d{self.dim}"


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchPartials:
    """The specification."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: PartialsShape) -> None:
        self._shape = shape

    def __call__(
        self,
        partial_out: Tensor,
        partial_lse: Tensor,
        reductions: Tensor,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        lse: Tensor | None = None,
        row_tokens: int | None = None,
    ) -> Tensor:
        """Reduce the slots of each record into the rows of `out` [T, heads, dim] that it names; returns `out`.

        partial_out float32[slots, kv_heads, M, dim], partial_lse float32[slots, kv_heads, M]: M packed queries a tile.
        reductions int32: a section of `work.pack`, on the device. sinks float32[heads], natural logarithm. lse
        float32[T, heads] receives log2 of each query's sum, its sink included. row_tokens: no row has more query
        tokens; a smaller grid for the same work.
        """
        group = self._shape.heads // self._shape.kv_heads
        records = reductions.view(-1, 8).tolist()
        for first, count, query, tokens, first_m, *_ in records[1 : 1 + records[0][0]]:
            packed = torch.arange(first_m, min(first_m + partial_out.shape[2], tokens * group))
            states = slice(first, first + count), slice(None), slice(0, len(packed))
            total, weights = _weights(partial_lse[states].to(wide(out.dtype)), sinks, group, packed)
            token = query + packed // group
            head = torch.arange(self._shape.kv_heads)[:, None] * group + packed % group
            parts = partial_out[states].to(weights.dtype).masked_fill(weights.unsqueeze(-1) == 0, 0)
            out[token, head] = (parts * weights.unsqueeze(-1)).sum(0).to(out.dtype)
            if lse is not None:
                lse[token, head] = total.to(lse.dtype)
        return out


def _weights(lse: Tensor, sinks: Tensor | None, group: int, packed: Tensor) -> tuple[Tensor, Tensor]:
    """lse [pieces, Hkv, m] -> log2 of the sum [Hkv, m], and each piece's share of it."""
    every = lse
    if sinks is not None:
        sink = sinks.to(lse.dtype).view(-1, group)[:, packed % group] * LOG2_E
        every = torch.cat((lse, sink.unsqueeze(0)))
    total = torch.logsumexp(every / LOG2_E, 0) * LOG2_E
    return total, torch.exp2(lse - total.masked_fill(total == float("-inf"), 0))


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def _reduce(
    PARTIAL, PARTIAL_LSE, REDUCTIONS, SINKS, OUT, LSE, rows, out_steps, wants_lse,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program per KV head, packed query of a tile and record; PIECES states at a time.

    out_steps: stride of OUT in 16 elements, so that the compiler sees what a row is aligned to.
    """
    head = tl.program_id(0)
    local = tl.program_id(1)
    at = tl.program_id(2)
    if at >= tl.load(REDUCTIONS):
        return
    record = REDUCTIONS + (1 + at) * 8
    first_slot = tl.load(record)
    pieces = tl.load(record + 1)
    first_m = tl.load(record + 4)
    m = first_m + local
    if m >= tl.load(record + 3) * GROUP:
        return
    token = (tl.load(record + 2) + m // GROUP).to(tl.int64)
    query_head = head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in tl.range(0, pieces, PIECES):
        piece = begin + tl.arange(0, PIECES)
        inside = piece < pieces
        state = ((first_slot + piece).to(tl.int64) * KV_HEADS + head) * rows + local
        lse = tl.load(PARTIAL_LSE + state, mask=inside, other=float("-inf"))
        parts = tl.load(PARTIAL + state[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        now = tl.maximum(best, tl.max(lse, 0, keep_dims=True))
        safe = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp2(best - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0, keep_dims=True)
        best = now
    if HAS_SINKS:
        sink = tl.load(SINKS + query_head) * 1.4426950408889634
        now = tl.maximum(best, sink)
        shrink = tl.exp2(best - now)
        acc *= shrink
        total = total * shrink + tl.exp2(sink - now)
        best = now
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + token * (out_steps * 16) + query_head * D + d, cast(acc, OUT.dtype.element_ty), mask=d < D)
    if wants_lse:
        tl.store(LSE + token * (KV_HEADS * GROUP) + query_head + tl.arange(0, 1), best + tl.log2(total))


class TritonPartials:
    """See `TorchPartials.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: PartialsShape, config: Config) -> None:
        self._shape = shape
        float32 = pointer(torch.float32)
        self._program = Program(
            _reduce,
            types={
                "PARTIAL": float32,
                "PARTIAL_LSE": float32,
                "REDUCTIONS": pointer(torch.int32),
                "SINKS": float32,
                "OUT": pointer(shape.dtype),
                "LSE": float32,
                "rows": "i32",
                "out_steps": "i32",
                "wants_lse": "i32",
            },
            constants={
                "GROUP": shape.heads // shape.kv_heads,
                "KV_HEADS": shape.kv_heads,
                "D": shape.dim,
                "BLOCK_D": 1 << (shape.dim - 1).bit_length(),
                "PIECES": config["PIECES"],
                "HAS_SINKS": shape.sinks,
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(
        self,
        partial_out: Tensor,
        partial_lse: Tensor,
        reductions: Tensor,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        lse: Tensor | None = None,
        row_tokens: int | None = None,
    ) -> Tensor:
        shape = self._shape
        slots, _, rows, _ = partial_out.shape
        check(partial_out, "partial_out", (None, shape.kv_heads, None, shape.dim))
        check(partial_lse, "partial_lse", (slots, shape.kv_heads, rows))
        check(out, "out", (None, shape.heads, shape.dim))
        if not partial_out.is_contiguous() or not partial_lse.is_contiguous():
            raise InputError("partial states are not contiguous; allocate them whole")
        if out.stride(1) != shape.dim or out.stride(0) % 16:
            raise InputError(
                f"out has strides {out.stride()}; heads must follow each other, tokens be a multiple of 16 apart"
            )
        assert shape.sinks == (sinks is not None), "bound for the other way"
        if lse is not None:
            check(lse, "lse", (out.shape[0], shape.heads))
        used = rows if row_tokens is None else min(rows, row_tokens * (shape.heads // shape.kv_heads))
        self._program(
            (shape.kv_heads, used, reductions.shape[0] // 8 - 1),
            partial_out, partial_lse, reductions, partial_lse if sinks is None else sinks, out,
            partial_lse if lse is None else lse, rows, out.stride(0) // 16, int(lse is not None),
        )  # fmt: skip
        return out


def _refuses(capabilities: Capabilities, shape: PartialsShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads are no multiple of {shape.kv_heads} KV heads"
    if shape.dim % 16 or not 16 <= shape.dim <= MAX_DIM:
        return f"a head size of {shape.dim} is no multiple of 16 up to {MAX_DIM}"
    return ""


def _configs(_capabilities: Capabilities, _shape: PartialsShape) -> Sequence[Config]:
    return [{"PIECES": pieces, "num_warps": warps, "num_stages": 1} for pieces in (4, 8, 16, 32) for warps in (1, 2, 4)]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: PartialsShape, states: int, tokens: int) -> Traffic:
    """Reads `states` states of one query head each, writes the output of `tokens` tokens."""
    read = states * (shape.dim + 1) * 4
    return Traffic(bytes=read + tokens * shape.heads * shape.dim * shape.dtype.itemsize, flops=3 * states * shape.dim)


def _call(shape: PartialsShape, rows: Sequence[tuple[int, int]], random: torch.Generator, device: torch.device) -> Call:
    """rows: (query tokens, KV tokens). Pieces of 64 tokens; every fifth state saw nothing."""
    queries, kv_lens = np.array(rows, np.int64).reshape(-1, 2).T
    cu_q = np.cumsum(queries) - queries
    tiling = Tiling(group=shape.heads // shape.kv_heads, kv_heads=shape.kv_heads, block_m=16, block_n=64)
    work = plan_work(cu_q, queries, kv_lens, tiling, Split(programs=0, fixed=64))
    buffer, _ = pack([(work.reductions, len(work.reductions) + 1)])
    draw = partial(torch.randn, generator=random, dtype=torch.float32)
    states = draw(work.slots, shape.kv_heads, tiling.block_m, shape.dim)
    lse = draw(work.slots, shape.kv_heads, tiling.block_m).mul_(3)
    lse[torch.rand(lse.shape, generator=random) < 0.2] = float("-inf")
    states[lse == float("-inf")] = 0.0
    tokens = int(queries.sum())
    arguments = {
        "partial_out": states,
        "partial_lse": lse,
        "reductions": torch.from_numpy(buffer),
        "out": torch.empty(tokens, shape.heads, shape.dim, dtype=shape.dtype),
        "lse": torch.empty(tokens, shape.heads),
        "sinks": draw(shape.heads) if shape.sinks else None,
        "row_tokens": int(queries.max()),
    }
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return Call(arguments=placed, outputs=("out", "lse"), precision=shape.dtype)


def cases() -> Sequence[Case[PartialsShape]]:
    """One and several tiles a row, more pieces than a block of them, a head size that is no power of two."""
    small = [
        (PartialsShape(heads=4, kv_heads=2, dim=64, dtype=torch.float32), [(1, 128), (1, 700)]),
        (PartialsShape(heads=6, kv_heads=2, dim=96, dtype=torch.bfloat16, sinks=True), [(3, 130), (7, 200)]),
        (PartialsShape(heads=16, kv_heads=1, dim=512, dtype=torch.float16), [(2, 90)]),
    ]
    large = [(PartialsShape(heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16), [(1, 64 * 48)])]
    return [_case(shape, rows, bench=False) for shape, rows in small] + [
        _case(shape, rows, bench=True) for shape, rows in large
    ]


def _case(shape: PartialsShape, rows: Sequence[tuple[int, int]], *, bench: bool) -> Case[PartialsShape]:
    states = sum(count * shape.heads * -(-tokens // 64) for count, tokens in rows)
    name = f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}" + "-".join(f"-{q}x{kv}" for q, kv in rows)
    traffic = model(shape, states, sum(count for count, _ in rows))
    return Case(name=name, shape=shape, make=partial(_call, shape, rows), traffic=traffic, bench=bench)


def _shapes(_capabilities: Capabilities) -> Sequence[PartialsShape]:
    bfloat16 = partial(PartialsShape, dtype=torch.bfloat16)
    return [
        *(bfloat16(heads=32, kv_heads=8, dim=dim) for dim in (64, 96, 128, 256)),
        bfloat16(heads=64, kv_heads=8, dim=64, sinks=True),
        bfloat16(heads=128, kv_heads=1, dim=512),
    ]


FAMILY: Family[PartialsShape, TorchPartials | TritonPartials] = Family(
    op="partials",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonPartials, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchPartials(shape)),
    ),
    shapes=_shapes,
    cases=cases,
)
