"""The tensors a decoder holds, and their shapes. Projections that read the same input are fused at load.

q, k, v become one matrix (rows in that order), gate and up another: fewer, larger products.
It does not know what a checkpoint calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from baton_engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Names one tensor of a decoder. `layer` is None for those outside the layers."""

    layer: int | None
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    out: Tensor  # [hidden, heads * head_dim]
    out_bias: Tensor | None
    attention_post_norm: Tensor | None  # [hidden]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None
    mlp_post_norm: Tensor | None  # [hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embed: Tensor  # [vocab_size, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab_size, hidden]; the embedding itself when tied

    @property
    def bytes(self) -> int:
        held = [self.embed, self.final_norm, *([] if self.head is self.embed else [self.head])]
        for layer in self.layers:
            held += [tensor for field in fields(layer) if (tensor := getattr(layer, field.name)) is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def target_shapes(spec: ModelSpec) -> dict[Target, tuple[int, ...]]:
    """Every tensor of a decoder with this spec."""
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (spec.hidden,),
        "qkv": (qkv, spec.hidden),
        "out": (spec.hidden, spec.heads * spec.head_dim),
        "mlp_norm": (spec.hidden,),
        "gate_up": (2 * spec.intermediate, spec.hidden),
        "down": (spec.hidden, spec.intermediate),
    }
    if spec.qkv_bias:
        layer["qkv_bias"] = (qkv,)
    if spec.out_bias:
        layer["out_bias"] = (spec.hidden,)
    if spec.mlp_bias:
        layer |= {"gate_up_bias": (2 * spec.intermediate,), "down_bias": (spec.hidden,)}
    if spec.qk_norm:
        layer |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    if spec.post_norms:
        layer |= {"attention_post_norm": (spec.hidden,), "mlp_post_norm": (spec.hidden,)}
    shapes = {
        Target(layer=None, field="embed"): (spec.vocab_size, spec.hidden),
        Target(layer=None, field="final_norm"): (spec.hidden,),
    }
    if not spec.tied_head:
        shapes[Target(layer=None, field="head")] = (spec.vocab_size, spec.hidden)
    for index in range(len(spec.layers)):
        shapes |= {Target(layer=index, field=field): shape for field, shape in layer.items()}
    return shapes


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> dict[Target, Tensor]:
    """Uninitialised tensors for every target."""
    return {target: torch.empty(shape, dtype=dtype, device=device) for target, shape in target_shapes(spec).items()}


def assemble(spec: ModelSpec, tensors: Mapping[Target, Tensor]) -> ModelWeights:
    """Records over the tensors of `allocate`; no copy."""
    names = [field.name for field in fields(LayerWeights)]
    embed = tensors[Target(layer=None, field="embed")]
    return ModelWeights(
        embed=embed,
        layers=tuple(
            LayerWeights(**{name: tensors.get(Target(layer=index, field=name)) for name in names})  # type: ignore[arg-type]
            for index in range(len(spec.layers))
        ),
        final_norm=tensors[Target(layer=None, field="final_norm")],
        head=tensors.get(Target(layer=None, field="head"), embed),
    )
