"""Root-mean-square normalisation, with the residual added first and 8-bit quantisation behind where wanted.

The statistic is always float32. Llama's way rounds to the input's dtype before the weight is applied, Gemma's (`wide`)
after it, with a float32 weight to which one is already added. In float32 they are the same.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.quant import FP8_GROUP, fp8_groups, fp8_max, store_fp8_groups
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.check import check, check_contiguous, check_rows, lanes, wide
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import Config, Program, pointer

MAX_WIDTH = 16384  # one program holds one row in registers


@dataclass(frozen=True, slots=True, kw_only=True)
class NormShape:
    """Rows of `width` elements."""

    width: int
    dtype: torch.dtype
    wide: bool = False
    residual: bool = False
    quantised: bool = False

    @property
    def label(self) -> str:
        return f"w{self.width}" + "-add" * self.residual + "-fp8" * self.quantised


# ---- reference ------------------------------------------------------------------------------------------------------
def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as size one; float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] or broadcastable, both of one dtype. New tensor of that dtype."""
    return torch.mul(x, inverse_rms(x, eps)).to(x.dtype).mul_(weight)


def rms_norm_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] of any dtype, weight float32 (the offset from one is already added). New tensor of x's dtype."""
    return torch.mul(x, inverse_rms(x, eps)).mul_(weight).to(x.dtype)


class TorchNorm:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: NormShape) -> None:
        self._compute = rms_norm_wide if shape.wide else rms_norm
        self._quantised = shape.quantised

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Normalise rows of x [T, width]. Returns `out`, or a new tensor where it is None.

        residual [T, width]: x is added to it in place first, and the sum is normalised. Quantised: out is 8-bit and
        scales float32[T, width / 128] receives the factor of each group.
        """
        if residual is not None:
            x = residual.add_(x)
        if not self._quantised:
            result = self._compute(x, weight, eps)
            return result if out is None else out.copy_(result)
        assert out is not None, "a quantised norm writes where it is told"
        assert scales is not None, "a quantised norm writes where it is told"
        return fp8_groups(torch.mul(x, inverse_rms(x, eps)).mul_(weight), out, scales)


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def _norm_rows(
    X, W, R, OUT, SCALES, eps, s_x, s_r, s_out,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """One program per row. GROUP = 0: OUT has X's dtype and SCALES is not touched."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(X + tl.multiple_of(row * s_x, LANES) + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        sums = R + tl.multiple_of(row * s_r, LANES) + at
        x += tl.load(sums, mask=inside, other=0.0).to(tl.float32)
        rounded = cast(x, R.dtype.element_ty)
        tl.store(sums, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the statistic is of what later layers will read
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.multiple_of(row * s_out, LANES)
    if GROUP == 0:
        if not WIDE:
            y = cast(y, OUT.dtype.element_ty).to(tl.float32)
        tl.store(OUT + out + at, cast(y * weight, OUT.dtype.element_ty), mask=inside)
    else:
        store_fp8_groups(y * weight, OUT, SCALES, out, row * (WIDTH // GROUP), 0, WIDTH, BLOCK, GROUP, FP8_MAX)


class TritonNorm:
    """See `TorchNorm.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: NormShape, config: Config) -> None:
        self._shape = shape
        fp8 = capabilities.fp8 if shape.quantised else None
        self._out = fp8 or shape.dtype
        self._lanes = lanes(shape.width, shape.dtype, self._out)
        self._program = Program(
            _norm_rows,
            types={
                "X": pointer(shape.dtype),
                "W": pointer(torch.float32 if shape.wide else shape.dtype),
                "R": pointer(shape.dtype),
                "OUT": pointer(self._out),
                "SCALES": pointer(torch.float32 if shape.quantised else shape.dtype),
                "eps": "fp32",
                "s_x": "i32",
                "s_r": "i32",
                "s_out": "i32",
            },
            constants={
                "WIDTH": shape.width,
                "BLOCK": 1 << (shape.width - 1).bit_length(),
                "WIDE": shape.wide,
                "ADD": shape.residual,
                "LANES": self._lanes,
                "GROUP": 0 if fp8 is None else FP8_GROUP,
                "FP8_MAX": 0.0 if fp8 is None else fp8_max(fp8),
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        shape, rows = self._shape, x.shape[0]
        if out is None:
            out = torch.empty(x.shape, dtype=self._out, device=x.device)
        check(x, "x", (None, shape.width))
        check(out, "out", (rows, shape.width))
        check(weight, "weight", (shape.width,))
        assert shape.residual == (residual is not None), "bound for the other way"
        if residual is not None:
            check(residual, "residual", (rows, shape.width))
        if shape.quantised:
            assert scales is not None, "a quantised norm writes where it is told"
            check(scales, "scales", (rows, shape.width // FP8_GROUP))
            check_contiguous(scales, "scales")
        added = x if residual is None else residual
        for tensor, name in ((x, "x"), (added, "residual"), (out, "out")):
            check_rows(tensor, name, self._lanes)
        self._program(
            (rows, 1, 1), x, weight, added, out, x if scales is None else scales,
            eps, x.stride(0), added.stride(0), out.stride(0),
        )  # fmt: skip
        return out


def _refuses(capabilities: Capabilities, shape: NormShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.width > MAX_WIDTH:
        return f"rows of {shape.width} elements do not fit in one program; {MAX_WIDTH} do"
    if shape.quantised and capabilities.fp8 is None:
        return f"{capabilities.name} has no 8-bit floats"
    if shape.quantised and shape.width % FP8_GROUP:
        return f"a width of {shape.width} has no whole groups of {FP8_GROUP}"
    return ""


def _configs(_capabilities: Capabilities, _shape: NormShape) -> Sequence[Config]:
    return [{"num_warps": warps, "num_stages": 1} for warps in (2, 4, 8, 16)]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: NormShape, rows: int) -> Traffic:
    """Reads x, writes out; with a residual reads and writes that too. The weight stays in a cache."""
    size = shape.dtype.itemsize
    written = 1 if shape.quantised else size
    scales = 4 / FP8_GROUP if shape.quantised else 0
    moved = rows * shape.width * (size * (3 if shape.residual else 1) + written + scales)
    return Traffic(bytes=int(moved), flops=4 * rows * shape.width)


def _call(shape: NormShape, rows: int, random: torch.Generator, device: torch.device) -> Call:
    draw = partial(torch.randn, generator=random, dtype=torch.float32)
    weight = draw(shape.width).mul_(0.1).add_(1.0)
    arguments = {
        "x": draw(rows, shape.width).to(shape.dtype),
        "weight": weight if shape.wide else weight.to(shape.dtype),
        "eps": 1e-6,
        "out": torch.empty(rows, shape.width, dtype=torch.float8_e4m3fn if shape.quantised else shape.dtype),
    }
    outputs = ["out"]
    if shape.residual:
        arguments["residual"] = draw(rows, shape.width).to(shape.dtype)
        outputs.append("residual")
    if shape.quantised:
        arguments["scales"] = torch.empty(rows, shape.width // FP8_GROUP)
        outputs.append("scales")
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return Call(
        arguments=placed,
        outputs=tuple(outputs),
        updated=("residual",) if shape.residual else (),
        units_last_place=("out",) if shape.quantised else (),
        precision=shape.dtype,
    )


def cases() -> Sequence[Case[NormShape]]:
    """Widths with and without a remainder, each way of rounding, no row and several."""
    small = [
        (NormShape(width=64, dtype=torch.float32), 3),
        (NormShape(width=96, dtype=torch.float16), 5),
        (NormShape(width=256, dtype=torch.bfloat16, residual=True), 4),
        (NormShape(width=100, dtype=torch.bfloat16, wide=True, residual=True), 4),
        (NormShape(width=256, dtype=torch.bfloat16, residual=True, quantised=True), 2),
        (NormShape(width=64, dtype=torch.float32), 0),
    ]
    large = [
        (NormShape(width=4096, dtype=torch.bfloat16, residual=True, quantised=quantised), rows, goal)
        for quantised in (False, True)
        for rows, goal in ((64, None), (2048, 0.85), (8192, 0.90))
    ]
    found = [_case(shape, rows, bench=False, goal=None) for shape, rows in small]
    return found + [_case(shape, rows, bench=True, goal=goal) for shape, rows, goal in large]


def _case(shape: NormShape, rows: int, *, bench: bool, goal: float | None) -> Case[NormShape]:
    name = f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}{'-wide' * shape.wide}-t{rows}"
    return Case(
        name=name, shape=shape, make=partial(_call, shape, rows), traffic=model(shape, rows), bench=bench, goal=goal
    )


def _shapes(capabilities: Capabilities) -> Sequence[NormShape]:
    shapes = [
        NormShape(width=width, dtype=torch.bfloat16, residual=residual)
        for width in (896, 4096, 8192)
        for residual in (False, True)
    ]
    shapes.append(NormShape(width=3584, dtype=torch.bfloat16, wide=True, residual=True))
    if capabilities.fp8 is not None:
        shapes.append(NormShape(width=4096, dtype=torch.bfloat16, residual=True, quantised=True))
    return shapes


FAMILY: Family[NormShape, TorchNorm | TritonNorm] = Family(
    op="rms_norm",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonNorm, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchNorm(shape)),
    ),
    shapes=_shapes,
    cases=cases,
    expects={"_norm_rows": ("wide load",)},
)
