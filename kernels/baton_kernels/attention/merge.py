"""Merge of two attention states of the same queries over disjoint KV tokens: cascade, context parallel, chunked prefix.

A state is (out, lse), as in `partials`: lse is the logarithm *to base 2* of the sum of exp(score), -inf where nothing
was seen; what `out` holds there is not read. A state that holds a sink keeps it; at most one of the two may.
See "FlashInfer", arXiv 2501.01005, section 2.2. It does not know where the states come from.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton_kernels.attention.partials import LOG2_E
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.check import check, wide
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer

MAX_ELEMENTS = 1 << 15  # of one token: one program holds them


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeShape:
    """Outputs [T, heads, dim] of `dtype`; their lse is float32."""

    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"h{self.heads}-d{self.dim}"


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchMerge:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __call__(
        self,
        out_a: Tensor,
        lse_a: Tensor,
        out_b: Tensor,
        lse_b: Tensor,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """out_a, out_b [T, heads, dim]; lse_a, lse_b float32[T, heads]; all contiguous.

        Writes `out` (None: a new tensor) and `lse` (None: not wanted), which may be those of a or of b; returns `out`.
        """
        both = torch.stack((lse_a, lse_b)).to(wide(out_a.dtype))
        total = torch.logsumexp(both / LOG2_E, 0) * LOG2_E
        weights = torch.exp2(both - total.masked_fill(total == float("-inf"), 0)).unsqueeze(-1)
        states = torch.stack((out_a, out_b)).to(weights.dtype).masked_fill(weights == 0, 0)
        result = (states * weights).sum(0).to(out_a.dtype)
        if lse is not None:
            lse.copy_(total)
        return result if out is None else out.copy_(result)


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def _merge(
    A, LSE_A, B, LSE_B, OUT, LSE, wants_lse,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = h < HEADS
    a = tl.load(LSE_A + token * HEADS + h, mask=inside, other=float("-inf"))
    b = tl.load(LSE_B + token * HEADS + h, mask=inside, other=float("-inf"))
    best = tl.maximum(a, b)
    safe = tl.where(best == float("-inf"), 0.0, best)
    weight_a = tl.exp2(a - safe)
    weight_b = tl.exp2(b - safe)
    total = weight_a + weight_b
    at = token * (HEADS * D) + h[:, None] * D + d[None, :]
    within = inside[:, None] & (d < D)[None, :]
    out_a = tl.load(A + at, mask=within & (a > float("-inf"))[:, None], other=0.0).to(tl.float32)
    out_b = tl.load(B + at, mask=within & (b > float("-inf"))[:, None], other=0.0).to(tl.float32)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    merged = out_a * (weight_a * share)[:, None] + out_b * (weight_b * share)[:, None]
    tl.store(OUT + at, cast(merged, OUT.dtype.element_ty), mask=within)
    if wants_lse:
        tl.store(LSE + token * HEADS + h, best + tl.log2(total), mask=inside)


class TritonMerge:
    """See `TorchMerge.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: MergeShape, config: Config) -> None:
        self._shape = shape
        state, lse = pointer(shape.dtype), pointer(torch.float32)
        self._program = Program(
            _merge,
            types={"A": state, "LSE_A": lse, "B": state, "LSE_B": lse, "OUT": state, "LSE": lse, "wants_lse": "i32"},
            constants={
                "HEADS": shape.heads,
                "D": shape.dim,
                "BLOCK_H": 1 << (shape.heads - 1).bit_length(),
                "BLOCK_D": 1 << (shape.dim - 1).bit_length(),
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(
        self,
        out_a: Tensor,
        lse_a: Tensor,
        out_b: Tensor,
        lse_b: Tensor,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        shape, tokens = self._shape, out_a.shape[0]
        if out is None:
            out = torch.empty_like(out_a)
        states = {"out_a": out_a, "out_b": out_b, "out": out}
        sums = {"lse_a": lse_a, "lse_b": lse_b} | ({} if lse is None else {"lse": lse})
        for name, tensor in states.items():
            check(tensor, name, (tokens, shape.heads, shape.dim))
        for name, tensor in sums.items():
            check(tensor, name, (tokens, shape.heads))
        for name, tensor in (states | sums).items():
            if not tensor.is_contiguous():
                raise InputError(f"{name} is not contiguous; make a copy of it")
        self._program(
            (tokens, 1, 1), out_a, lse_a, out_b, lse_b, out, lse_a if lse is None else lse, int(lse is not None)
        )
        return out


def _refuses(capabilities: Capabilities, shape: MergeShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.heads * shape.dim > MAX_ELEMENTS:
        return f"{shape.heads} heads of {shape.dim} do not fit in one program; {MAX_ELEMENTS} elements do"
    return ""


def _configs(_capabilities: Capabilities, _shape: MergeShape) -> Sequence[Config]:
    return [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 16)]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: MergeShape, tokens: int) -> Traffic:
    """Reads two states, writes one."""
    elements = tokens * shape.heads * shape.dim
    return Traffic(bytes=3 * (elements * shape.dtype.itemsize + tokens * shape.heads * 4), flops=3 * elements)


def _call(shape: MergeShape, tokens: int, random: torch.Generator, device: torch.device) -> Call:
    draw = partial(torch.randn, generator=random, dtype=torch.float32)
    arguments: dict[str, Tensor] = {}
    for side in "ab":
        lse = draw(tokens, shape.heads).mul_(4)
        lse[torch.rand(lse.shape, generator=random) < 0.3] = float("-inf")
        state = draw(tokens, shape.heads, shape.dim).to(shape.dtype)
        state[lse == float("-inf")] = float("nan")
        arguments |= {f"out_{side}": state, f"lse_{side}": lse}
    arguments["out"] = torch.empty(tokens, shape.heads, shape.dim, dtype=shape.dtype)
    arguments["lse"] = torch.empty(tokens, shape.heads)
    placed = {name: value.to(device) for name, value in arguments.items()}
    return Call(arguments=placed, outputs=("out", "lse"), precision=shape.dtype)


def cases() -> Sequence[Case[MergeShape]]:
    """States that saw nothing on one side and on both; sizes that are no powers of two; no token."""
    small = [
        (MergeShape(heads=4, dim=64, dtype=torch.float32), 9),
        (MergeShape(heads=6, dim=80, dtype=torch.bfloat16), 5),
        (MergeShape(heads=8, dim=128, dtype=torch.float16), 3),
        (MergeShape(heads=4, dim=64, dtype=torch.float32), 0),
    ]
    large = [(MergeShape(heads=32, dim=128, dtype=torch.bfloat16), tokens) for tokens in (64, 2048)]
    return [_case(*one, bench=False) for one in small] + [_case(*one, bench=True) for one in large]


def _case(shape: MergeShape, tokens: int, *, bench: bool) -> Case[MergeShape]:
    name = f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}-t{tokens}"
    goal = 0.85 if tokens >= 2048 else None
    traffic = model(shape, tokens)
    return Case(name=name, shape=shape, make=partial(_call, shape, tokens), traffic=traffic, bench=bench, goal=goal)


def _shapes(_capabilities: Capabilities) -> Sequence[MergeShape]:
    sizes = ((32, 64), (32, 96), (32, 128), (16, 256))
    return [MergeShape(heads=heads, dim=dim, dtype=torch.bfloat16) for heads, dim in sizes]


FAMILY: Family[MergeShape, TorchMerge | TritonMerge] = Family(
    op="merge",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonMerge, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, _shape, _config: TorchMerge()),
    ),
    shapes=_shapes,
    cases=cases,
)
