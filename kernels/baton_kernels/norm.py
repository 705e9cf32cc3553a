"""Root-mean-square normalisation: the torch reference, with the two roundings that checkpoints were trained with.

The statistic is always float32. `rms_norm` rounds to the input's dtype before the weight is applied (Llama's way),
`rms_norm_wide` after it (Gemma's way, whose weight is stored as an offset from one). In float32 they are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as size one; float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] or broadcastable, both of one dtype. New tensor of that dtype."""
    return torch.mul(x, inverse_rms(x, eps)).to(x.dtype).mul_(weight)


def rms_norm_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] of any dtype, weight float32 (the offset from one is already added). New tensor of x's dtype."""
    return torch.mul(x, inverse_rms(x, eps)).mul_(weight).to(x.dtype)
