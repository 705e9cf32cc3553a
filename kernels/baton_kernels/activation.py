"""Gated activations of the feed-forward block: act(gate) * up, on the fused output of the gate and up projections.

With 8-bit quantisation behind where the next projection wants that. It does not know the projections.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from baton_kernels.capabilities import Capabilities
from baton_kernels.quant import FP8_GROUP, fp8_groups, fp8_max, store_fp8_groups
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.check import check, check_contiguous, check_rows, lanes, wide
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import Config, Program, pointer

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedShape:
    """Rows of `width` gates and then as many ups."""

    width: int
    dtype: torch.dtype
    kind: str = "silu"  # key of ACTIVATIONS
    quantised: bool = False

    @property
    def label(self) -> str:
        return f"w{self.width}-{self.kind}" + "-fp8" * self.quantised


# ---- reference ------------------------------------------------------------------------------------------------------
def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """gate_up [T, 2 * I], gate first. Returns a new [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)


class TorchGated:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: GatedShape) -> None:
        self._activation = ACTIVATIONS[shape.kind]
        self._quantised = shape.quantised

    def __call__(self, gate_up: Tensor, *, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """act(gate) * up of gate_up [T, 2 * width], gate first. Returns `out` [T, width], or a new tensor for None.

        Quantised: out is 8-bit and scales float32[T, width / 128] receives the factor of each group.
        """
        if not self._quantised:
            result = gated(gate_up, self._activation)
            return result if out is None else out.copy_(result)
        assert out is not None, "a quantised activation writes where it is told"
        assert scales is not None, "a quantised activation writes where it is told"
        return fp8_groups(gated(gate_up.to(wide(gate_up.dtype)), self._activation), out, scales)


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3): no target-independent tanh.
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@jit
def _gate_rows(
    X, OUT, SCALES, s_x, s_out,
    WIDTH: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (t, i): block i of row t. GROUP = 0: OUT has X's dtype and SCALES is not touched."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = X + tl.multiple_of(row * s_x, LANES) + at
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + WIDTH, mask=inside, other=0.0).to(tl.float32)
    y = _activated(gate, KIND) * up
    out = tl.multiple_of(row * s_out, LANES)
    if GROUP == 0:
        tl.store(OUT + out + at, cast(y, OUT.dtype.element_ty), mask=inside)
    else:
        store_fp8_groups(y, OUT, SCALES, out, row * (WIDTH // GROUP), begin, WIDTH, BLOCK, GROUP, FP8_MAX)


class TritonGated:
    """See `TorchGated.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: GatedShape, config: Config) -> None:
        self._shape = shape
        fp8 = capabilities.fp8 if shape.quantised else None
        self._out = fp8 or shape.dtype
        self._lanes = lanes(shape.width, shape.dtype, self._out)
        block = min(config["BLOCK"], max(FP8_GROUP, 1 << (shape.width - 1).bit_length()))
        self._blocks = -(-shape.width // block)
        self._program = Program(
            _gate_rows,
            types={
                "X": pointer(shape.dtype),
                "OUT": pointer(self._out),
                "SCALES": pointer(torch.float32 if shape.quantised else shape.dtype),
                "s_x": "i32",
                "s_out": "i32",
            },
            constants={
                "WIDTH": shape.width,
                "KIND": shape.kind,
                "LANES": self._lanes,
                "GROUP": 0 if fp8 is None else FP8_GROUP,
                "FP8_MAX": 0.0 if fp8 is None else fp8_max(fp8),
                "BLOCK": block,
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(self, gate_up: Tensor, *, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        shape, rows = self._shape, gate_up.shape[0]
        if out is None:
            out = torch.empty(rows, shape.width, dtype=self._out, device=gate_up.device)
        for tensor, name, width in ((gate_up, "gate_up", 2 * shape.width), (out, "out", shape.width)):
            check(tensor, name, (rows, width))
            check_rows(tensor, name, self._lanes)
        if shape.quantised:
            assert scales is not None, "a quantised activation writes where it is told"
            check(scales, "scales", (rows, shape.width // FP8_GROUP))
            check_contiguous(scales, "scales")
        self._program(
            (rows, self._blocks, 1), gate_up, out, gate_up if scales is None else scales,
            gate_up.stride(0), out.stride(0),
        )  # fmt: skip
        return out


def _refuses(capabilities: Capabilities, shape: GatedShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.quantised and capabilities.fp8 is None:
        return f"{capabilities.name} has no 8-bit floats"
    if shape.quantised and shape.width % FP8_GROUP:
        return f"a width of {shape.width} has no whole groups of {FP8_GROUP}"
    return ""


def _configs(_capabilities: Capabilities, _shape: GatedShape) -> Sequence[Config]:
    return [
        {"BLOCK": 256 * warps * share, "num_warps": warps, "num_stages": 1}
        for warps in (1, 2, 4, 8)
        for share in (1, 2, 4)
    ]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: GatedShape, rows: int) -> Traffic:
    """Reads gates and ups, writes their products."""
    size = shape.dtype.itemsize
    written = 1 + 4 / FP8_GROUP if shape.quantised else size
    elements = rows * shape.width
    return Traffic(bytes=int(elements * (2 * size + written)), flops=6 * elements)


def _call(shape: GatedShape, rows: int, random: torch.Generator, device: torch.device) -> Call:
    gap = 16  # rows may lie apart
    apart = torch.randn(rows, 2 * shape.width + gap, generator=random).mul_(3.0).to(shape.dtype)
    arguments = {
        "gate_up": apart.to(device)[:, : 2 * shape.width],
        "out": torch.empty(rows, shape.width, dtype=torch.float8_e4m3fn if shape.quantised else shape.dtype).to(device),
    }
    if shape.quantised:
        arguments["scales"] = torch.empty(rows, shape.width // FP8_GROUP, device=device)
    return Call(
        arguments=arguments,
        outputs=("out", "scales") if shape.quantised else ("out",),
        units_last_place=("out",) if shape.quantised else (),
        precision=shape.dtype,
    )


def cases() -> Sequence[Case[GatedShape]]:
    """Each kind; widths with a remainder of a block, of an access and of neither; no row and several."""
    bf16 = torch.bfloat16
    small = [
        (GatedShape(width=96, dtype=torch.float32, kind="silu"), 3),
        (GatedShape(width=96, dtype=torch.float32, kind="gelu"), 3),
        (GatedShape(width=96, dtype=torch.float32, kind="gelu_tanh"), 3),
        (GatedShape(width=2304, dtype=torch.float16, kind="gelu_tanh"), 2),
        (GatedShape(width=100, dtype=bf16, kind="silu"), 5),
        (GatedShape(width=256, dtype=bf16, kind="gelu"), 2),
        (GatedShape(width=2304, dtype=bf16, kind="silu", quantised=True), 3),
        (GatedShape(width=384, dtype=torch.float32, kind="gelu_tanh", quantised=True), 2),
        (GatedShape(width=64, dtype=torch.float32), 0),
    ]
    large = [
        (GatedShape(width=14336, dtype=bf16, quantised=quantised), rows)
        for quantised in (False, True)
        for rows in (64, 2048, 8192)
    ]
    return [
        Case(
            name=f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}-t{rows}",
            shape=shape,
            make=partial(_call, shape, rows),
            traffic=model(shape, rows),
            bench=bench,
            goal=0.90 if bench and rows > 64 else None,
        )
        for bench, group in ((False, small), (True, large))
        for shape, rows in group
    ]


def _shapes(capabilities: Capabilities) -> Sequence[GatedShape]:
    bf16 = torch.bfloat16
    shapes = [GatedShape(width=width, dtype=bf16) for width in (4864, 14336, 28672)]
    shapes += [GatedShape(width=14336, dtype=bf16, kind=kind) for kind in ("gelu", "gelu_tanh")]
    if capabilities.fp8 is not None:
        shapes.append(GatedShape(width=14336, dtype=bf16, quantised=True))
    return shapes


FAMILY: Family[GatedShape, TorchGated | TritonGated] = Family(
    op="gated",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonGated, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchGated(shape)),
    ),
    shapes=_shapes,
    cases=cases,
    expects={"_gate_rows": ("wide load",)},
)
