"""Checks of an operation's tensors before a kernel touches them: with a wrong stride it would answer, and wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from baton_kernels.rt.program import ALIGNMENT_BYTES, InputError


def check(tensor: Tensor, name: str, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    """InputError unless `tensor` has this shape (None: any size) and dtype and its last axis is contiguous."""
    if tensor.dim() != len(shape) or any(
        want is not None and size != want for size, want in zip(tensor.shape, shape, strict=False)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
    if dtype is not None and tensor.dtype is not dtype:
        raise InputError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InputError(f"{name} is not contiguous in its last axis (stride {tensor.stride(-1)}); make a copy of it")


def check_contiguous(tensor: Tensor, name: str) -> None:
    """InputError unless elements lie one behind the other."""
    if not tensor.is_contiguous():
        raise InputError(f"{name} is not contiguous (strides {list(tensor.stride())}); make a copy of it")


def lanes(width: int, *dtypes: torch.dtype) -> int:
    """Elements that every row of `width` starts at a multiple of: as many as fill one access of the narrowest dtype, or
    what the width leaves of them. Kernels are promised this of row strides, or each element would be its own access."""
    return math.gcd(ALIGNMENT_BYTES // min(dtype.itemsize for dtype in dtypes), width)


def check_rows(tensor: Tensor, name: str, multiple: int) -> None:
    """InputError unless rows start at multiples of `multiple` elements (see `lanes`)."""
    if tensor.shape[0] > 1 and tensor.stride(0) % multiple:
        raise InputError(f"{name} has rows {tensor.stride(0)} elements apart, expected a multiple of {multiple}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which a reference computes: float32, or float64 where a test wants more digits than that."""
    return torch.float64 if dtype is torch.float64 else torch.float32
