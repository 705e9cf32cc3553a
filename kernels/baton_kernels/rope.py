"""Rotary position embedding: frequencies of every scaling rule, the tables of one step, and the rotation.

Halves are rotated against each other (the layout of Hugging Face checkpoints). Angles are float32, the tables are
rounded to the dtype of the model.
RoPE: arXiv 2104.09864; YaRN: arXiv 2309.00071; `llama3`: the rule published with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One rule. Fields that its kind does not use keep their defaults, so that equal rules compare equal."""

    kind: str = "default"  # key of KINDS
    theta: float = 10_000.0
    factor: float = 1.0  # linear, llama3, yarn
    original_tokens: int = 0  # llama3, yarn: context length before stretching
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    amplitude: float = 1.0  # yarn: factor on cos and sin
    truncate: bool = True  # yarn: whole dimensions as borders of the ramp

    def frequencies(self, dim: int) -> Tensor:
        """float32[dim / 2], radians per position."""
        return KINDS[self.kind](self, dim)


def _default(spec: RopeSpec, dim: int) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies: Tensor = 1.0 / spec.theta**exponents
    return frequencies


def _linear(spec: RopeSpec, dim: int) -> Tensor:
    return _default(spec, dim) / spec.factor


def _llama3(spec: RopeSpec, dim: int) -> Tensor:
    """Keep short waves, stretch long ones, blend between."""
    plain = _default(spec, dim)
    turns = spec.original_tokens / (2 * math.pi / plain)  # how often a wave fits in the original context
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * plain / spec.factor + keep * plain


def _yarn(spec: RopeSpec, dim: int) -> Tensor:
    """Interpolate dimensions that turn slowly, keep those that turn fast, ramp between."""
    plain = _default(spec, dim)

    def dimension_of(turns: float) -> float:
        return dim * math.log(spec.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    stretch = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / spec.factor * stretch + plain * (1 - stretch)


KINDS: Mapping[str, Callable[[RopeSpec, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_tables(positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions int64[T], frequencies float32[D/2]. Returns cos [T, 1, D] and sin [T, 1, D/2] in `dtype`."""
    angles = positions.float().unsqueeze(-1) * frequencies
    cos = angles.cos().mul_(amplitude).to(dtype)
    sin = angles.sin().mul_(amplitude).to(dtype)
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), sin.unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] (strided is fine) with the tables of `rope_tables`. New contiguous tensor of the same dtype."""
    half = x.shape[-1] // 2
    out = torch.mul(x, cos)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out
