"""Checks of an operation's tensors before a kernel touches them: with a wrong stride it would answer, and wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton_kernels.rt.program import InputError


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


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which a reference computes: float32, or float64 where a test wants more digits than that."""
    return torch.float64 if dtype is torch.float64 else torch.float32
