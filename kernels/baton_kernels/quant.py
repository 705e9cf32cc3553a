"""8-bit codes with a factor: the roundings that every producer shares. value = code * factor.

The factor of floats (e4m3) is given, or made per group of elements: largest magnitude of the group / largest code.
Encodings differ by device: OCP's on NVIDIA and gfx950, without negative zero (`fnuz`) on gfx942; see "FP8 Formats for
Deep Learning", arXiv 2209.05433. Integers are symmetric, with a factor per row.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from baton_kernels.rt.check import wide
from baton_kernels.rt.language import cast, jit, tl

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FP8_GROUP = 128  # elements that share a factor
INT8_MAX = 127.0  # -128 is not used
SMALLEST_SCALE = 1e-12  # of a group of zeros


def fp8_max(dtype: torch.dtype) -> float:
    """Largest finite value of an 8-bit float."""
    return torch.finfo(dtype).max


def fp8_groups(x: Tensor, out: Tensor, scales: Tensor) -> Tensor:
    """Reference: x float32[T, W] into codes out [T, W] and factors scales float32[T, W / FP8_GROUP]. Returns out."""
    groups = x.view(*x.shape[:-1], -1, FP8_GROUP)
    largest = fp8_max(out.dtype)
    scales.copy_(groups.abs().amax(-1).div_(largest).clamp_(min=SMALLEST_SCALE))
    return out.copy_((groups / scales.unsqueeze(-1)).clamp_(-largest, largest).view_as(x))


def fp8_codes(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Reference: codes of x, saturated at the largest one. New tensor."""
    largest = fp8_max(dtype)
    return x.to(wide(x.dtype)).div(factor).clamp_(-largest, largest).to(dtype)


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: codes of x [..., D], rounded to nearest even, and factors [...]. New tensors."""
    x = x.to(wide(x.dtype))
    scales = x.abs().amax(-1).div_(INT8_MAX).clamp_(min=SMALLEST_SCALE)
    return (x / scales.unsqueeze(-1)).round_().to(torch.int8), scales


@jit
def round_even(x):
    """float32 `x` of a magnitude below 2**22, rounded to an integer."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: neighbours are 1 apart there


@jit
def store_fp8_groups(
    y, CODES, SCALES, codes, scales, begin,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """`fp8_groups` of y float32[BLOCK], elements `begin` and on of a row of WIDTH; the row's codes start at element
    `codes`, its factors at `scales`. `begin`, WIDTH and BLOCK are multiples of GROUP."""
    at = begin + tl.arange(0, BLOCK)
    groups = tl.reshape(y, (BLOCK // GROUP, GROUP))
    scale = tl.maximum(tl.max(tl.abs(groups), 1) / FP8_MAX, 1e-12)
    coded = cast(tl.clamp(groups / scale[:, None], -FP8_MAX, FP8_MAX), CODES.dtype.element_ty)
    tl.store(CODES + codes + at, tl.reshape(coded, (BLOCK,)), mask=at < WIDTH)
    group = begin // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(SCALES + scales + group, scale, mask=group < WIDTH // GROUP)
