"""8-bit floats of the e4m3 kind with one factor per group of elements: the rounding that every producer shares.

value = code * scale, scale = largest magnitude of the group / largest code. Encodings differ by device: OCP's on NVIDIA
and gfx950, without negative zero (`fnuz`) on gfx942. See "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_GROUP = 128  # elements that share a factor
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
