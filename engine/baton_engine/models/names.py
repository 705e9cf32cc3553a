"""Weight names of Hugging Face checkpoints: which tensor goes to which rows of which target.

The table is spelled out for a spec, so that "missing", "unknown" and "mis-shaped" are plain set and shape comparisons.
It does not read files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from baton_engine.models.families import FAMILIES
from baton_engine.models.spec import ModelSpec
from baton_engine.models.weights import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Rows [begin, begin + shape[0]) of `target` come from one tensor of the checkpoint."""

    target: Target
    begin: int
    shape: tuple[int, ...]


def weight_slots(spec: ModelSpec) -> dict[str, Slot]:
    """Slot of every tensor the decoder needs, by name without the checkpoint's prefix."""
    slots = {
        "embed_tokens.weight": _whole(None, "embed", (spec.vocab_size, spec.hidden)),
        "norm.weight": _whole(None, "final_norm", (spec.hidden,)),
    }
    if not spec.tied_head:
        slots["lm_head.weight"] = _whole(None, "head", (spec.vocab_size, spec.hidden))
    for index in range(len(spec.layers)):
        slots |= {f"layers.{index}.{name}": slot for name, slot in _layer(spec, index)}
    return slots


def strip_prefix(names: Iterable[str], spec: ModelSpec) -> dict[str, str]:
    """Name in the checkpoint by name without prefix. Tensors of other parts and of older writers are left out."""
    family = FAMILIES[spec.family]
    names = set(names)
    prefix = next((one for one in family.prefixes if f"{one}embed_tokens.weight" in names), family.prefixes[0])
    plain: dict[str, str] = {}
    for name in names:
        if name.startswith(family.ignored) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.endswith("lm_head.weight"):
            # Some writers store the tied head as well; it is the embedding again.
            if not spec.tied_head:
                plain["lm_head.weight"] = name
        elif name.startswith(prefix):
            plain[name.removeprefix(prefix)] = name
        else:
            plain[name] = name
    return plain


def _whole(layer: int | None, field: str, shape: tuple[int, ...]) -> Slot:
    return Slot(target=Target(layer=layer, field=field), begin=0, shape=shape)


def _layer(spec: ModelSpec, index: int) -> Iterator[tuple[str, Slot]]:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = (
        ("self_attn.q_proj", "qkv", 0, q, spec.hidden, spec.qkv_bias),
        ("self_attn.k_proj", "qkv", q, kv, spec.hidden, spec.qkv_bias),
        ("self_attn.v_proj", "qkv", q + kv, kv, spec.hidden, spec.qkv_bias),
        ("self_attn.o_proj", "out", 0, spec.hidden, q, spec.out_bias),
        ("mlp.gate_proj", "gate_up", 0, spec.intermediate, spec.hidden, spec.mlp_bias),
        ("mlp.up_proj", "gate_up", spec.intermediate, spec.intermediate, spec.hidden, spec.mlp_bias),
        ("mlp.down_proj", "down", 0, spec.hidden, spec.intermediate, spec.mlp_bias),
    )
    for name, field, begin, rows, columns, bias in projections:
        yield f"{name}.weight", Slot(target=Target(layer=index, field=field), begin=begin, shape=(rows, columns))
        if bias:
            yield f"{name}.bias", Slot(target=Target(layer=index, field=f"{field}_bias"), begin=begin, shape=(rows,))
    for name, field in FAMILIES[spec.family].norms.items():
        yield f"{name}.weight", _whole(index, field, (spec.hidden,))
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", _whole(index, "q_norm", (spec.head_dim,))
        yield "self_attn.k_norm.weight", _whole(index, "k_norm", (spec.head_dim,))
