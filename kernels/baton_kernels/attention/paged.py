"""Attention over paged KV with Triton: launches `kernel.attend` over a plan's work, then reduces what was split.

Calls take the plan that `plan` made for their step and window; they allocate nothing when `out` is given, wait for
nothing and read no device data, so they may be captured. It does not know who owns a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from baton_kernels import configs
from baton_kernels.attention import flashinfer
from baton_kernels.attention.cases import cases, shapes
from baton_kernels.attention.kernel import attend
from baton_kernels.attention.partials import FAMILY as PARTIALS
from baton_kernels.attention.partials import LOG2_E, PartialsShape, TritonPartials
from baton_kernels.attention.plan import MEDIUM_TILE, SMALL_TILE, PagedPlan, StepPlanner, Tile
from baton_kernels.attention.reference import TorchAttention
from baton_kernels.attention.shape import AttentionShape, Rows, Scores, Upload
from baton_kernels.attention.work import RECORD, Capacity, Split, Tiling
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Family, Implementation, like_kernel, needs_triton
from baton_kernels.rt.check import check
from baton_kernels.rt.program import TYPE_NAMES, Config, InputError, Program, pointer

NO_WINDOW = 1 << 30
TILES = ("DECODE", "VERIFY", "EXTEND")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonAttention:
    """One operation serves all layers of its shape; calls follow each other in one stream's order."""

    def __init__(self, capabilities: Capabilities, shape: AttentionShape, config: Config) -> None:
        self._shape = shape
        spread = Split(programs=capabilities.units * config["WAVES"])
        idle = Split(programs=capabilities.units, level=False)
        rows = {"decode": (SMALL_TILE, spread), "verify": (MEDIUM_TILE, spread), "extend": (config["EXTEND_M"], idle)}
        self._tiles = {
            name: Tile(tiling=_tiling(shape, block_m, config[f"{name.upper()}_N"]), split=split)
            for name, (block_m, split) in rows.items()
        }
        self._described = {name: _described(capabilities, shape, config, name) for name in rows}
        self._programs = {name: self._program(capabilities, config, name) for name in rows}
        states = PartialsShape(
            heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, dtype=shape.dtype, sinks=shape.sinks
        )
        reduce_config = configs.find(PARTIALS.op, capabilities, states.label).config
        self._reduce = TritonPartials(capabilities, states, reduce_config)
        self.programs = (*self._programs.values(), *self._reduce.programs)
        self._planner = StepPlanner(shape, self._tiles)
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
        """Plan one step; may allocate, and uploads one int32 array (`upload`: default is a plain copy that blocks).

        page_table int32[B, P]; row b owns query tokens [cu_q[b], cu_q[b+1]), the last ones of its kv_lens[b] tokens.
        Only the host's copies of lengths are read. `window` of the layers that will use the plan.
        capacity: array, grids and workspace are as large as its largest step needs, so that a graph captured with one
        plan may be replayed with another's array in the same place; None: as large as this step.
        fixed_split_tokens: split a row by its own length alone, so that its output does not depend on the batch.
        InputError for lengths that do not fit.
        """
        del cu_q, kv_lens
        return self._planner.plan(
            page_table,
            cu_q_host,
            kv_lens_host,
            window=window,
            upload=upload,
            capacity=capacity,
            fixed_split_tokens=fixed_split_tokens,
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
        for launch in plan.launches:
            nothing = launch.partial_lse
            self._programs[launch.name](
                (shape.kv_heads, len(launch.units) // RECORD - 1, 1),
                q, self._descriptor(kv, launch.name) if self._described[launch.name] else kv,
                nothing if kv_scales is None else kv_scales, plan.page_table, launch.units,
                launch.units if tree is None else tree, nothing if scores.sinks is None else scores.sinks, out,
                nothing if lse is None else lse, launch.partial_out, launch.partial_lse,
                scores.scale * fold, NO_WINDOW if scores.window is None else scores.window,
                q.stride(0) // 16, out.stride(0) // 16, plan.page_table.stride(0), int(lse is not None),
            )  # fmt: skip
            if launch.reductions is not None:
                self._reduce(
                    launch.partial_out,
                    launch.partial_lse,
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

    def _descriptor(self, kv: Tensor, name: str) -> Any:
        """Of one layer's view, made once: the view must stay where it is."""
        block_n = self._tiles[name].tiling.block_n
        key = (kv.data_ptr(), kv.shape[0], block_n)
        if key not in self._descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - absent where there is no Triton

            block = [1, 1, 1, block_n, self._shape.padded_dim]
            self._descriptors[key] = TensorDescriptor(kv, list(kv.shape), list(kv.stride()), block)
        return self._descriptors[key]

    def _program(self, capabilities: Capabilities, config: Config, name: str) -> Program:
        tiling, described = self._tiles[name].tiling, self._described[name]
        return Program(
            attend,
            types=_types(self._shape, tiling, descriptor=described),
            constants=_constants(self._shape, tiling, descriptor=described),
            config={"num_warps": config[f"{name.upper()}_WARPS"], "num_stages": config[f"{name.upper()}_STAGES"]},
            capabilities=capabilities,
            variant=name,
        )


def _tiling(shape: AttentionShape, block_m: int, block_n: int) -> Tiling:
    return Tiling(group=shape.group, kv_heads=shape.kv_heads, block_m=block_m, block_n=block_n)


def _described(capabilities: Capabilities, shape: AttentionShape, config: Config, name: str) -> bool:
    """Whether a program copies KV by tensor descriptor: asked for, possible, and blocks lie inside pages."""
    wanted = bool(config.get(f"{name.upper()}_DESCRIPTORS", 0))
    return wanted and capabilities.descriptors and shape.page_tokens % config[f"{name.upper()}_N"] == 0


def _types(shape: AttentionShape, tiling: Tiling, *, descriptor: bool) -> Mapping[str, str]:
    float32, integers = pointer(torch.float32), pointer(torch.int32)
    block = f"tensordesc<{TYPE_NAMES[shape.kv_dtype]}[1, 1, 1, {tiling.block_n}, {shape.padded_dim}]>"
    return {
        "Q": pointer(shape.dtype),
        "KV": block if descriptor else pointer(shape.kv_dtype),
        "FACTORS": float32,
        "TABLE": integers + "~",
        "UNITS": integers,
        "TREES": pointer(torch.int64 if shape.tree else torch.int32) + "~",
        "SINKS": float32 + "~",
        "OUT": pointer(shape.dtype),
        "LSE": float32 + "~",
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
    found = [base | {"WAVES": waves} for waves in (1, 2, 3, 4, 6)] + [base | {"EXTEND_M": 64}]
    for name, block_n, warps, stages in product(TILES, (32, 64, 128), (2, 4, 8), (2, 3, 4, 5)):
        own = {f"{name}_N": block_n, f"{name}_WARPS": warps, f"{name}_STAGES": stages}
        kinds = (0, 1) if capabilities.descriptors else (0,)
        found.extend(base | own | {f"{name}_DESCRIPTORS": kind} for kind in kinds)
    return found


FAMILY: Family[AttentionShape, TorchAttention | TritonAttention | flashinfer.FlashInferAttention] = Family(
    op="attention",
    implementations=(
        Implementation(
            name="flashinfer", refuses=flashinfer.refuses, bind=flashinfer.FlashInferAttention, optional=True
        ),
        Implementation(name="triton", refuses=refuses, bind=TritonAttention, configs=_configs),
        Implementation(
            name="torch", refuses=like_kernel(refuses), bind=lambda _capabilities, shape, _config: TorchAttention(shape)
        ),
    ),
    shapes=shapes,
    cases=cases,
    expects={"attend": ("matrix", "wide load"), "attend:extend": ("widest matrix",)},
)
