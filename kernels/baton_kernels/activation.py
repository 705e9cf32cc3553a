"""Gated activations of the feed-forward block: act(gate) * up, on the fused output of the gate and up projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """gate_up [T, 2 * I], gate first. Returns a new [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)
