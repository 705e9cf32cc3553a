"""What a decoder-only model is, as data: the generic decoder reads this and nothing else.

Frozen and complete: two equal specs with equal weights compute the same function, so the spec is part of the digest.
It does not know where weights lie or what they are called.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton_kernels.rope import RopeSpec
from baton_kvtransfer.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec
    window: int | None = None  # tokens that a query sees, itself included; None = all before it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One checkpoint's architecture. Attention scores are multiplied by `query_scale`, then capped, then masked."""

    family: str  # row of families.FAMILIES
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int  # prompt and output together
    layers: tuple[LayerSpec, ...]
    activation: str  # key of baton_kernels.activation.ACTIVATIONS
    norm_eps: float
    norm_wide: bool  # weight is an offset from one, applied before rounding (Gemma)
    post_norms: bool  # the outputs of attention and feed-forward are normalised before they are added (Gemma)
    qk_norm: bool  # queries and keys are normalised per head
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_head: bool
    query_scale: float
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Distinct rules, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    def layout(self, page_tokens: int, kv_dtype: str) -> PageLayout:
        """KV pool of this model on one rank."""
        return PageLayout(
            layers=len(self.layers),
            kv=2,
            heads=self.kv_heads,
            page_tokens=page_tokens,
            dim=self.head_dim,
            dtype=kv_dtype,
        )

    def rope_text(self) -> str:
        """The rotary rules in one line for the compat record: keys are cached rotated, so both sides must agree."""
        return "; ".join(_rule(rope) for rope in self.ropes)


def _rule(rope: RopeSpec) -> str:
    plain = RopeSpec()
    fields = [name for name in RopeSpec.__dataclass_fields__ if name not in ("kind", "theta")]
    extra = [f"{name}={getattr(rope, name)!r}" for name in fields if getattr(rope, name) != getattr(plain, name)]
    return " ".join((f"{rope.kind} theta={rope.theta!r}", *extra))
