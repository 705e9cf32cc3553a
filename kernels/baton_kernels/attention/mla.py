"""Latent attention with Triton: all heads and query tokens of a row packed into tiles, KV split over the device.

A tile reads the latent once and uses it twice, as keys and as values. A plan is made once per step, outside of graphs,
and serves all layers; it holds every buffer that its launches read or write, so who captures a call keeps its plan.
It does not know who owns a page.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton_kernels.attention.latent import CODES, LATENT, ROPE, WIDTH, LatentShape, TorchLatent, cases, shapes
from baton_kernels.attention.partials import FAMILY as PARTIALS
from baton_kernels.attention.partials import LOG2_E, PartialsShape, TritonPartials
from baton_kernels.attention.shape import Rows, Upload, upload_to
from baton_kernels.attention.work import RECORD, Capacity, Split, Tiling, pack, plan_work
from baton_kernels.capabilities import Capabilities
from baton_kernels.oracle import choices
from baton_kernels.registry import Family, Implementation, like_kernel, needs_triton
from baton_kernels.rt.check import check
from baton_kernels.rt.language import INTERPRET, cast, jit, operand, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer


@jit
def _decoded(x, dtype: tl.constexpr):
    """8-bit codes as an operand of `dtype`, which holds each of them exactly; everything else as it is."""
    if INTERPRET:
        return x.to(tl.float32)
    else:
        return x.to(dtype)


@jit
def _attend_latent(
    Q, KV, TABLE, UNITS, OUT, LSE, PARTIAL, PARTIAL_LSE, scale, factor, q_steps, table_width, wants_lse,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, S_PAGE: tl.constexpr,
    S_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per unit of `work.plan_work`. BLOCK_N divides PAGE. scale: to log2, and an 8-bit cache's factor.

    q_steps: stride of Q in 16 elements, so that the compiler sees what a row is aligned to.
    """
    unit = tl.program_id(0)
    if unit >= tl.load(UNITS):
        return
    record = UNITS + (1 + unit) * 8
    row = tl.load(record)
    first_token = tl.load(record + 1)
    tokens = tl.load(record + 2)
    kv_tokens = tl.load(record + 3)
    first_m = tl.load(record + 4)
    begin = tl.load(record + 5)
    end = tl.load(record + 6)
    slot = tl.load(record + 7)

    local = tl.arange(0, BLOCK_M)
    d = tl.arange(0, LATENT)
    r = LATENT + tl.arange(0, ROPE)
    within = tl.arange(0, BLOCK_N)
    if HEADS % BLOCK_M == 0:  # the tile has one query token: masks need a register, not one for each of its rows
        token = tl.full([BLOCK_M], 0, tl.int32) + first_m // HEADS
        head = first_m % HEADS + local
    else:
        token = (first_m + local) // HEADS
        head = (first_m + local) % HEADS
    inside = token < tokens
    position = kv_tokens - tokens + token
    query = Q + (first_token + token).to(tl.int64) * (q_steps * 16) + head * (LATENT + ROPE)
    q_latent = tl.load(query[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    q_rope = tl.load(query[:, None] + r[None, :], mask=inside[:, None], other=0.0)

    dtype: tl.constexpr = Q.dtype.element_ty
    pages = TABLE + row.to(tl.int64) * table_width
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, LATENT], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        n = start + within
        held = (n < end)[:, None]
        page = tl.load(pages + start // PAGE).to(tl.int64)
        block = KV + (page * S_PAGE + start % PAGE * S_TOKEN)
        latent = tl.load(block + (within[:, None] * S_TOKEN + d[None, :]), mask=held, other=0.0)
        rope = tl.load(block + (within[:, None] * S_TOKEN + r[None, :]), mask=held, other=0.0)
        latent = _decoded(latent, dtype)
        scores = tl.dot(operand(q_rope), tl.trans(_decoded(rope, dtype)))
        scores = tl.dot(operand(q_latent), tl.trans(latent), scores)
        # No query sees beyond `end`: it is a multiple of BLOCK_N, or follows the tile's last position.
        scores = tl.where(n[None, :] <= position[:, None], scores * scale, float("-inf"))
        now = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(operand(cast(weights, dtype)), latent, acc * shrink[:, None])
        best = now

    acc *= (factor / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = best + tl.log2(total)
    if slot < 0:
        at = (first_token + token).to(tl.int64) * HEADS + head
        tl.store(OUT + (at[:, None] * LATENT + d[None, :]), cast(acc, OUT.dtype.element_ty), mask=inside[:, None])
        if wants_lse:
            tl.store(LSE + at, lse, mask=inside)
    else:
        state = slot.to(tl.int64) * BLOCK_M + local
        tl.store(PARTIAL + (state[:, None] * LATENT + d[None, :]), acc)
        tl.store(PARTIAL_LSE + state, lse)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentPlan:
    """One step's work, on the device."""

    page_table: Tensor  # int32[B, P]
    units: Tensor  # int32: a section of `work.pack`
    reductions: Tensor | None  # the same; None: nothing is split
    row_tokens: int  # no row has more query tokens
    partials: Tensor  # float32[slots, 1, tile, 512]
    partial_sums: Tensor  # float32[slots, 1, tile]


class TritonLatent:
    """One operation serves all layers of its shape; calls must follow each other in one stream's order."""

    def __init__(self, capabilities: Capabilities, shape: LatentShape, config: Config) -> None:
        self._shape = shape
        self.tiling = Tiling(
            group=shape.heads,
            kv_heads=1,
            block_m=min(shape.tile, config["BLOCK_M"]),
            block_n=math.gcd(config["BLOCK_N"], shape.page_tokens),
        )
        self._split = Split(programs=max(1, capabilities.units * config["PERCENT"] // 100))
        floats, ints, queries = pointer(torch.float32), pointer(torch.int32), pointer(shape.dtype)
        self._program = Program(
            _attend_latent,
            types={
                "Q": queries,
                "KV": pointer(shape.kv_dtype),
                "TABLE": ints,
                "UNITS": ints,
                "OUT": queries,
                "LSE": floats,
                "PARTIAL": floats,
                "PARTIAL_LSE": floats,
                "scale": "fp32",
                "factor": "fp32",
                "q_steps": "i32",
                "table_width": "i32",
                "wants_lse": "i32",
            },
            constants={
                "HEADS": shape.heads,
                "LATENT": LATENT,
                "ROPE": ROPE,
                "PAGE": shape.page_tokens,
                "S_PAGE": shape.kv_strides[0],
                "S_TOKEN": shape.kv_strides[1],
                "BLOCK_M": self.tiling.block_m,
                "BLOCK_N": self.tiling.block_n,
            },
            config=config,
            capabilities=capabilities,
            variant=f"m{self.tiling.block_m}",
        )
        states = PartialsShape(heads=shape.heads, kv_heads=1, dim=LATENT, dtype=shape.dtype)
        self._reduce = TritonPartials(capabilities, states, choices(PARTIALS, capabilities, states)[0].config)
        self.programs = (self._program, *self._reduce.programs)
        self._workspace = (torch.empty(0), torch.empty(0))
        self._last: tuple[Rows, LatentPlan] | None = None

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
    ) -> LatentPlan:
        """Plan one step; allocates, and uploads one int32 array (`upload`: default is a plain copy that blocks).

        page_table int32[B, P]; row b owns query tokens [cu_q[b], cu_q[b+1]), the last ones of its kv_lens[b] tokens.
        Only the host's copies of lengths are read. capacity: array, grids and workspace are as large as its largest
        step needs, so that a graph captured with one plan may be replayed with another's array in the same place;
        None: as large as this step.
        """
        del cu_q, kv_lens
        first, kv = np.array(cu_q_host, np.int64), np.array(kv_lens_host, np.int64)
        queries = np.diff(first)
        check(page_table, "page_table", (len(kv), None), torch.int32)
        if (bad := np.flatnonzero((queries < 0) | (kv < queries) & (queries > 0))).size:
            raise InputError(f"row {bad[0]} has {queries[bad[0]]} queries but {kv[bad[0]]} tokens")
        if (bad := np.flatnonzero((kv > page_table.shape[1] * self._shape.page_tokens) & (queries > 0))).size:
            raise InputError(f"row {bad[0]}: {kv[bad[0]]} tokens do not fit in {page_table.shape[1]} pages")
        work = plan_work(first[:-1], queries, kv, self.tiling, self._split)
        room, tiles, slots = len(work.units), len(work.reductions), work.slots
        row_tokens = int(queries.max(initial=0))
        if capacity is not None:
            if len(kv) > capacity.rows or first[-1] > capacity.tokens or row_tokens > capacity.row_tokens:
                raise InputError(f"{len(kv)} rows of {first[-1]} tokens, up to {row_tokens} each, exceed {capacity}")
            room = slots = capacity.units(self.tiling, self._split)
            tiles, row_tokens = capacity.tiles(self.tiling), capacity.row_tokens
        sections = [(work.units, room), *([(work.reductions, tiles)] if slots else [])]
        buffer, places = pack(sections)
        device = page_table.device
        uploaded = (upload or upload_to(device))(buffer)
        partials, sums = self._room(slots, device)
        return LatentPlan(
            page_table=page_table,
            units=uploaded[places[0]],
            reductions=uploaded[places[1]] if slots else None,
            row_tokens=row_tokens,
            partials=partials,
            partial_sums=sums,
        )

    def _room(self, slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
        states = slots * self.tiling.block_m
        if self._workspace[1].numel() < states or self._workspace[1].device != device:
            self._workspace = torch.empty(states * LATENT, device=device), torch.empty(states, device=device)
        size = (slots, 1, self.tiling.block_m)
        return self._workspace[0][: states * LATENT].view(*size, LATENT), self._workspace[1][:states].view(size)

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        plan: LatentPlan | Rows,
        scale: float,
        *,
        factor: float = 1.0,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `TorchLatent.__call__`. Rows instead of a plan: planned now, unless they are the last ones."""
        if isinstance(plan, Rows):
            plan = self._plan_of(plan)
        if out is None:
            out = torch.empty(*q.shape[:2], LATENT, dtype=q.dtype, device=q.device)
        self._check(q, kv, out, lse)
        assert scale * factor > 0, "scores are scaled after their product is taken"
        self._program(
            (len(plan.units) // RECORD - 1, 1, 1), q, kv, plan.page_table, plan.units, out,
            plan.partial_sums if lse is None else lse, plan.partials, plan.partial_sums, scale * factor * LOG2_E,
            factor, q.stride(0) // 16, plan.page_table.stride(0), int(lse is not None),
        )  # fmt: skip
        if plan.reductions is not None:
            self._reduce(plan.partials, plan.partial_sums, plan.reductions, out, lse=lse, row_tokens=plan.row_tokens)
        return out

    def _plan_of(self, rows: Rows) -> LatentPlan:
        if self._last is None or self._last[0] is not rows:
            host = rows.cu_q_host, rows.kv_lens_host
            self._last = rows, self.plan(rows.page_table, rows.cu_q, rows.kv_lens, *host)
        return self._last[1]

    def _check(self, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor | None) -> None:
        shape, tokens = self._shape, q.shape[0]
        check(q, "q", (tokens, shape.heads, WIDTH), shape.dtype)
        if q.stride(1) != WIDTH or q.stride(0) % 16:
            raise InputError(
                f"q has strides {q.stride()}: heads must follow each other, tokens be a multiple of 16 elements apart"
            )
        check(kv, "kv", (None, 1, 1, shape.page_tokens, WIDTH), shape.kv_dtype)
        if (kv.stride(0), kv.stride(3)) != shape.kv_strides:
            raise InputError(f"kv has strides {kv.stride()}, the kernel is made for {shape.kv_strides}")
        check(out, "out", (tokens, shape.heads, LATENT), shape.dtype)
        if lse is not None:
            check(lse, "lse", (tokens, shape.heads), torch.float32)
        for name, tensor in (("out", out), ("lse", lse)):
            if tensor is not None and not tensor.is_contiguous():
                raise InputError(f"{name} is not contiguous; make a copy of it")


def refuses(capabilities: Capabilities, shape: LatentShape) -> str:
    """Why the kernel cannot, in a clause; "" = it can."""
    if why := needs_triton(capabilities):
        return why
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"queries of {shape.dtype} are neither bfloat16 nor float16"
    if shape.kv_dtype in CODES and shape.kv_dtype is not capabilities.fp8:
        return f"{capabilities.name} has {capabilities.fp8 or 'no 8-bit floats'}, KV is {shape.kv_dtype}"
    if shape.kv_dtype not in CODES and shape.kv_dtype is not shape.dtype:
        return f"KV of {shape.kv_dtype} with queries of {shape.dtype}; the same or 8-bit floats are possible"
    if shape.page_tokens % 16 or not 16 <= shape.page_tokens <= 128:
        return f"pages of {shape.page_tokens} tokens are no multiple of 16 up to 128"
    if any(stride * shape.kv_dtype.itemsize % 16 for stride in shape.kv_strides):
        return f"KV strides {shape.kv_strides} are not multiples of 16 bytes"
    return ""


def _configs(_capabilities: Capabilities, shape: LatentShape) -> Sequence[Config]:
    return [
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "PERCENT": percent, "num_warps": warps, "num_stages": stages}
        for block_m in (16, 32, 64)
        if block_m <= shape.tile
        for block_n in (16, 32, 64)
        for percent in (95, 190, 380)
        for warps in (4, 8)
        for stages in (1, 2)
    ]


FAMILY: Family[LatentShape, TorchLatent | TritonLatent] = Family(
    op="mla",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonLatent, configs=_configs),
        Implementation(
            name="torch", refuses=like_kernel(refuses), bind=lambda _capabilities, shape, _config: TorchLatent(shape)
        ),
    ),
    shapes=shapes,
    cases=cases,
    expects={
        "_attend_latent:m16": ("matrix", "wide load"),
        "_attend_latent:m32": ("matrix", "wide load"),
        "_attend_latent:m64": ("widest matrix", "wide load"),
    },
)
