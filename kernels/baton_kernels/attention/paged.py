"""Attention over paged KV with Triton: plans a step on the host, launches `kernel.attend`, reduces what was split.

Rows with few query tokens (decode, verification of drafts) share one launch, with tiles no larger than they need and
their KV split over the device; longer rows (prefill, chunks behind a cached prefix) have another. A plan is made once
per step, outside of graphs, and serves all layers of one window. It holds every buffer that its launches read or write,
so who captures a call keeps its plan. It does not know who owns a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton_kernels import configs
from baton_kernels.attention.cases import cases, shapes
from baton_kernels.attention.kernel import attend
from baton_kernels.attention.partials import FAMILY as PARTIALS
from baton_kernels.attention.partials import LOG2_E, PartialsShape, TritonPartials
from baton_kernels.attention.reference import TorchAttention
from baton_kernels.attention.shape import TREE_TOKENS, AttentionShape, Rows, Scores, Upload, upload_to
from baton_kernels.attention.work import RECORD, Capacity, Split, Tiling, pack, plan_work
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Family, Implementation, anywhere, needs_triton
from baton_kernels.rt.check import check
from baton_kernels.rt.program import TYPE_NAMES, Config, InputError, Program, pointer

SHORT_ROW = 16
"""Query tokens up to which a row's KV is split whatever else runs."""
SMALL_TILE, MEDIUM_TILE = 16, 64
NO_WINDOW = 1 << 30
TILES = ("DECODE", "VERIFY", "EXTEND")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One program of the operation: which tiles it computes and how their KV is split."""

    name: str
    tiling: Tiling
    split: Split
    program: Program
    descriptor: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One program's part of a step."""

    tile: Tile
    units: Tensor  # int32: a section of `work.pack`
    reductions: Tensor | None  # the same; None: nothing is split
    row_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """One step's work, on the device."""

    page_table: Tensor  # int32[B, P]
    window: int | None
    launches: tuple[Launch, ...]
    partials: Tensor  # float32: workspace, partial outputs first
    partial_sums: Tensor  # float32


class TritonAttention:
    """One operation serves all layers of its shape; calls must follow each other in one stream's order."""

    def __init__(self, capabilities: Capabilities, shape: AttentionShape, config: Config) -> None:
        self._shape = shape
        self._capabilities = capabilities
        crowd = capabilities.units * config["WAVES"]
        spread, idle = Split(programs=crowd), Split(programs=capabilities.units, level=False)
        self._tiles = {
            "decode": self._tile("decode", SMALL_TILE, spread, config),
            "verify": self._tile("verify", MEDIUM_TILE, spread, config),
            "extend": self._tile("extend", config["EXTEND_M"], idle, config),
        }
        states = PartialsShape(
            heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, dtype=shape.dtype, sinks=shape.sinks
        )
        self._reduce = TritonPartials(
            capabilities, states, configs.find(PARTIALS.op, capabilities, states.label).config
        )
        self.programs = (*(tile.program for tile in self._tiles.values()), *self._reduce.programs)
        self._workspace = (torch.empty(0), torch.empty(0))
        self._descriptors: dict[tuple[int, int, int], Any] = {}
        self._last: tuple[Rows, int | None, PagedPlan] | None = None

    def plan(
        self,
        page_table: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        cu_q_host: Sequence[int],
        kv_lens_host: Sequence[int],
        *,
        window: int | None = None,
        upload: Upload | None = None,
        capacity: Capacity | None = None,
        fixed_split_tokens: int = 0,
    ) -> PagedPlan:
        """Plan one step; allocates, and uploads one int32 array (`upload`: default is a plain copy that blocks).

        page_table int32[B, P]; row b owns query tokens [cu_q[b], cu_q[b+1]), the last ones of its kv_lens[b] tokens.
        Only the host's copies of lengths are read. `window` of the layers that will use the plan.
        capacity: array, grids and workspace are as large as its largest step needs, so that a graph captured with one
        plan may be replayed with another's array in the same place; None: as large as this step.
        fixed_split_tokens: split a row by its own length alone, so that its output does not depend on the batch.
        """
        del cu_q, kv_lens
        first, kv = np.array(cu_q_host, np.int64), np.array(kv_lens_host, np.int64)
        queries = np.diff(first)
        check(page_table, "page_table", (len(kv), None), torch.int32)
        if (bad := np.flatnonzero((queries < 0) | (kv < queries) & (queries > 0))).size:
            raise InputError(f"row {bad[0]} has {queries[bad[0]]} queries but {kv[bad[0]]} tokens")
        room = page_table.shape[1] * self._shape.page_tokens
        if (bad := np.flatnonzero((kv > room) & (queries > 0))).size:
            raise InputError(f"row {bad[0]}: {kv[bad[0]]} tokens do not fit in {page_table.shape[1]} pages")
        if self._shape.tree and window is not None and window < TREE_TOKENS:
            raise InputError(f"a window of {window} tokens is narrower than a tree; {TREE_TOKENS} are the least")
        if capacity is not None and (len(kv) > capacity.rows or int(first[-1]) > capacity.tokens):
            raise InputError(f"{len(kv)} rows of {first[-1]} tokens in a plan for {capacity.rows} of {capacity.tokens}")
        largest = int(queries.max(initial=0)) if capacity is None else capacity.row_tokens
        sections: list[tuple[np.ndarray[Any, np.dtype[np.int32]], int]] = []
        chosen: list[tuple[Tile, bool, int]] = []
        floats = sums = 0
        for name, mask in self._classes(queries, largest):
            tile = self._tiles[name]
            split = replace(tile.split, fixed=fixed_split_tokens if tile.split.level else 0)
            if fixed_split_tokens and not tile.split.level:
                split = Split(programs=0)
            counts = np.where(mask, queries, 0)
            work = plan_work(first[:-1], counts, kv, tile.tiling, split, window=window, tree=self._shape.tree)
            if capacity is None:
                units, tiles, slots = len(work.units), len(work.reductions), work.slots
            else:
                mine = replace(capacity, row_tokens=min(largest, SHORT_ROW) if tile.split.level else largest)
                units, tiles = mine.units(tile.tiling, split), mine.tiles(tile.tiling)
                slots = units if split.programs or split.fixed else 0
            reduces = slots > 0
            sections += [(work.units, units), *([(work.reductions, tiles)] if reduces else [])]
            chosen.append((tile, reduces, int(counts.max(initial=0)) if capacity is None else mine.row_tokens))
            states = slots * self._shape.kv_heads * tile.tiling.block_m
            floats, sums = max(floats, states * self._shape.dim), max(sums, states)
        return self._on_device(page_table, window, upload, sections, chosen, (floats, sums))

    def _classes(self, queries: np.ndarray[Any, np.dtype[np.int64]], largest: int) -> list[tuple[str, Any]]:
        """Programs that a step needs, with the rows that each one computes."""
        short = queries <= SHORT_ROW
        most = min(largest, SHORT_ROW)
        narrow = "decode" if most * self._shape.group <= SMALL_TILE else "verify"
        return [(narrow, short)] + ([("extend", ~short)] if largest > SHORT_ROW else [])

    def _on_device(
        self,
        page_table: Tensor,
        window: int | None,
        upload: Upload | None,
        sections: list[tuple[np.ndarray[Any, np.dtype[np.int32]], int]],
        chosen: list[tuple[Tile, bool, int]],
        sizes: tuple[int, int],
    ) -> PagedPlan:
        buffer, places = pack(sections)
        device = page_table.device
        uploaded = (upload or upload_to(device))(buffer)
        parts = iter([uploaded[place] for place in places])
        launches = [
            Launch(tile=tile, units=next(parts), reductions=next(parts) if reduces else None, row_tokens=most)
            for tile, reduces, most in chosen
        ]
        if any(have.numel() < want or have.device != device for have, want in zip(self._workspace, sizes, strict=True)):
            self._workspace = (torch.empty(sizes[0], device=device), torch.empty(sizes[1], device=device))
        return PagedPlan(
            page_table=page_table,
            window=window,
            launches=tuple(launches),
            partials=self._workspace[0],
            partial_sums=self._workspace[1],
        )

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        plan: PagedPlan | Rows,
        scores: Scores,
        *,
        kv_scales: Tensor | None = None,
        tree: Tensor | None = None,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of q [T, heads, dim] over one layer's kv; see `reference.paged_attention`. Query tokens outside the
        plan's rows are left as they are in `out`. Rows instead of a plan: planned now, unless they are the last ones.
        """
        if isinstance(plan, Rows):
            plan = self._plan_of(plan, scores.window)
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._check(q, kv, out, plan, scores, kv_scales, tree, lse)
        shape = self._shape
        fold = LOG2_E if shape.softcap is None else 2 * LOG2_E / shape.softcap
        any_float = plan.partial_sums
        for launch in plan.launches:
            tiling = launch.tile.tiling
            launch.tile.program(
                (shape.kv_heads, len(launch.units) // RECORD - 1, 1),
                q, self._descriptor(kv, tiling) if launch.tile.descriptor else kv,
                any_float if kv_scales is None else kv_scales, plan.page_table, launch.units,
                launch.units if tree is None else tree, any_float if scores.sinks is None else scores.sinks, out,
                any_float if lse is None else lse, plan.partials, plan.partial_sums,
                scores.scale * fold, NO_WINDOW if scores.window is None else scores.window,
                q.stride(0) // 16, out.stride(0) // 16, plan.page_table.stride(0), int(lse is not None),
            )  # fmt: skip
            if launch.reductions is not None:
                states = (-1, shape.kv_heads, tiling.block_m)
                used = plan.partial_sums.numel() // (states[1] * states[2]) * states[1] * states[2]
                self._reduce(
                    plan.partials[: used * shape.dim].view(*states, shape.dim),
                    plan.partial_sums[:used].view(states),
                    launch.reductions,
                    out,
                    sinks=scores.sinks,
                    lse=lse,
                    row_tokens=launch.row_tokens,
                )
        return out

    def _plan_of(self, rows: Rows, window: int | None) -> PagedPlan:
        if self._last is None or self._last[0] is not rows or self._last[1] != window:
            host = rows.cu_q_host, rows.kv_lens_host
            self._last = rows, window, self.plan(rows.page_table, rows.cu_q, rows.kv_lens, *host, window=window)
        return self._last[2]

    def _check(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        plan: PagedPlan,
        scores: Scores,
        kv_scales: Tensor | None,
        tree: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        shape, tokens = self._shape, q.shape[0]
        for name, tensor in (("q", q), ("out", out)):
            check(tensor, name, (tokens, shape.heads, shape.dim), shape.dtype)
            if tensor.stride(1) != shape.dim or tensor.stride(0) % 16:
                raise InputError(
                    f"{name} has strides {tensor.stride()}: heads must follow each other, tokens be a multiple of 16 "
                    f"elements apart"
                )
        check(kv, "kv", (None, 2, shape.kv_heads, shape.page_tokens, shape.dim), shape.kv_dtype)
        if kv.stride()[:4] != shape.kv_strides:
            raise InputError(f"kv has strides {kv.stride()}, the kernel is made for {shape.kv_strides}")
        assert plan.window == scores.window, "planned for another window"
        assert (shape.softcap, shape.sinks) == (scores.softcap, scores.sinks is not None), "bound for other scores"
        assert scores.scale > 0, "scores are scaled after their maximum is taken"
        if (0 if kv_scales is None else kv_scales.dim()) != shape.factors:
            raise InputError(f"kv of {shape.kv_dtype} needs kv_scales with {shape.factors} axes")
        if kv_scales is not None:
            wanted = (2,) if shape.factors == 1 else kv.shape[:4]
            check(kv_scales, "kv_scales", wanted, torch.float32)
        if shape.tree != (tree is not None):
            raise InputError("a tree mask is needed exactly where the shape has one")
        for name, given, like, dtype in (
            ("kv_scales", kv_scales, None, torch.float32),
            ("tree", tree, (tokens,), torch.int64),
            ("lse", lse, (tokens, shape.heads), torch.float32),
            ("sinks", scores.sinks, (shape.heads,), torch.float32),
        ):
            if given is None:
                continue
            if like is not None:
                check(given, name, like, dtype)
            if not given.is_contiguous():
                raise InputError(f"{name} is not contiguous; make a copy of it")

    def _descriptor(self, kv: Tensor, tiling: Tiling) -> Any:
        """Of one layer's view, made once: the view must stay where it is."""
        key = (kv.data_ptr(), kv.shape[0], tiling.block_n)
        if key not in self._descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - absent where there is no Triton

            block = [1, 1, 1, tiling.block_n, self._shape.padded_dim]
            self._descriptors[key] = TensorDescriptor(kv, list(kv.shape), list(kv.stride()), block)
        return self._descriptors[key]

    def _tile(self, name: str, block_m: int, split: Split, config: Config) -> Tile:
        shape, prefix = self._shape, name.upper()
        block_n = config[f"{prefix}_N"]
        whole = shape.page_tokens % block_n == 0
        descriptor = bool(config.get(f"{prefix}_DESCRIPTORS", 0)) and self._capabilities.descriptors and whole
        tiling = Tiling(group=shape.group, kv_heads=shape.kv_heads, block_m=block_m, block_n=block_n)
        program = Program(
            attend,
            types=_types(shape, tiling, descriptor=descriptor),
            constants=_constants(shape, tiling, descriptor=descriptor),
            config={"num_warps": config[f"{prefix}_WARPS"], "num_stages": config[f"{prefix}_STAGES"]},
            capabilities=self._capabilities,
            variant=name,
        )
        return Tile(name=name, tiling=tiling, split=split, program=program, descriptor=descriptor)


def _types(shape: AttentionShape, tiling: Tiling, *, descriptor: bool) -> Mapping[str, str]:
    float32, integers = pointer(torch.float32), pointer(torch.int32)
    block = f"tensordesc<{TYPE_NAMES[shape.kv_dtype]}[1, 1, 1, {tiling.block_n}, {shape.padded_dim}]>"
    return {
        "Q": pointer(shape.dtype),
        "KV": block if descriptor else pointer(shape.kv_dtype),
        "FACTORS": float32,
        "TABLE": integers,
        "UNITS": integers,
        "TREES": pointer(torch.int64) if shape.tree else integers,
        "SINKS": float32,
        "OUT": pointer(shape.dtype),
        "LSE": float32,
        "PARTIAL": float32,
        "PARTIAL_LSE": float32,
        "scale": "fp32",
        "window": "i32",
        "q_steps": "i32",
        "out_steps": "i32",
        "table_width": "i32",
        "wants_lse": "i32",
    }


def _constants(shape: AttentionShape, tiling: Tiling, *, descriptor: bool) -> Mapping[str, object]:
    page, half, head, token = shape.kv_strides
    return {
        "GROUP": shape.group,
        "KV_HEADS": shape.kv_heads,
        "D": shape.dim,
        "BLOCK_D": shape.padded_dim,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "PAGE": shape.page_tokens,
        "S_PAGE": page,
        "S_HALF": half,
        "S_HEAD": head,
        "S_TOKEN": token,
        "SOFTCAP": shape.softcap or 0.0,
        "HAS_SINKS": shape.sinks,
        "TREE": shape.tree,
        "ONE_FACTOR": shape.factors == 1,
        "TOKEN_FACTORS": shape.factors == 4,
        "DESCRIPTOR": descriptor,
    }


def refuses(capabilities: Capabilities, shape: AttentionShape) -> str:
    """Why the kernel cannot, in a clause; "" = it can."""
    if why := needs_triton(capabilities):
        return why
    if shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads are no multiple of {shape.kv_heads} KV heads"
    if shape.dim % 16 or not 16 <= shape.dim <= 256:
        return f"a head size of {shape.dim} is no multiple of 16 up to 256"
    if shape.page_tokens % 16 or not 16 <= shape.page_tokens <= 128:
        return f"pages of {shape.page_tokens} tokens are no multiple of 16 up to 128"
    if shape.dtype not in DTYPES:
        return f"queries of {shape.dtype} are none of bfloat16, float16, float32"
    if shape.factors == 1 and shape.kv_dtype is not capabilities.fp8:
        return f"{capabilities.name} has {capabilities.fp8 or 'no 8-bit floats'}, KV is {shape.kv_dtype}"
    if shape.factors == 0 and shape.kv_dtype is not shape.dtype:
        return f"KV of {shape.kv_dtype} with queries of {shape.dtype}; the same, int8 or 8-bit floats are possible"
    if any(stride * shape.kv_dtype.itemsize % 16 for stride in shape.kv_strides):
        return f"KV strides {shape.kv_strides} are not multiples of 16 bytes"
    return ""


def _configs(capabilities: Capabilities, _shape: AttentionShape) -> Sequence[Config]:
    """Each class of tile is swept with the others at a middle setting."""
    base = {"WAVES": 3, "EXTEND_M": 128, "EXTEND_DESCRIPTORS": 0}
    for name in TILES:
        base |= {f"{name}_N": 64, f"{name}_WARPS": 4, f"{name}_STAGES": 3}
    found = [base | {"WAVES": waves} for waves in (1, 2, 3, 4, 6)]
    for name, block_n, warps, stages in product(TILES, (32, 64, 128), (2, 4, 8), (2, 3, 4, 5)):
        own = {f"{name}_N": block_n, f"{name}_WARPS": warps, f"{name}_STAGES": stages}
        kinds = (0, 1) if capabilities.descriptors else (0,)
        found.extend(base | own | {f"{name}_DESCRIPTORS": kind} for kind in kinds)
    return found


FAMILY: Family[AttentionShape, TorchAttention | TritonAttention] = Family(
    op="attention",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonAttention, configs=_configs),
        Implementation(
            name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchAttention(shape)
        ),
    ),
    shapes=shapes,
    cases=cases,
    expects={"attend:extend": ("matrix",)},
)
