"""The families: config.json -> ModelSpec, one row of a table each. The only place that knows families by name.

Missing fields take the values `transformers` would take. What would change the function and is not understood
(a rotary rule, an activation, a kind of layer, quantisation) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton_common.errors import ConfigError
from baton_engine.models.fields import Fields
from baton_engine.models.ropes import gemma3_ropes, one_rope
from baton_engine.models.spec import LayerSpec, ModelSpec
from baton_kernels.rope import RopeSpec

Windows = Callable[[Fields, int], tuple[int | None, ...]]
Ropes = Callable[[Fields, tuple[int | None, ...]], tuple[RopeSpec, ...]]

ACTIVATION_NAMES: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
LLAMA_NORMS: Mapping[str, str] = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "mlp_norm",
}
GEMMA_NORMS: Mapping[str, str] = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def _no_windows(config: Fields, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _every_layer(config: Fields, layers: int) -> tuple[int | None, ...]:
    return (config.integer("sliding_window") if config.has("sliding_window") else None,) * layers


def _upper_layers(config: Fields, layers: int) -> tuple[int | None, ...]:
    if not config.flag("use_sliding_window", default=False) or not config.has("sliding_window"):
        return (None,) * layers
    full = config.integer("max_window_layers") if config.has("max_window_layers") else 0
    return _by_type(config, layers, lambda index: index >= full)


def _alternating(config: Fields, layers: int) -> tuple[int | None, ...]:
    period = config.integer("sliding_window_pattern", 2)
    return _by_type(config, layers, lambda index: (index + 1) % period != 0)


def _by_type(config: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """`layer_types` where the config has it, else the family's rule."""
    types = config.texts("layer_types")
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise config.wrong("layer_types", "made of sliding_attention and full_attention")
    if types and len(types) != layers:
        raise config.wrong("layer_types", f"{layers} entries long")
    sliding = [kind == "sliding_attention" for kind in types] or [slides(index) for index in range(layers)]
    window = config.integer("sliding_window") if any(sliding) else None
    return tuple(window if one else None for one in sliding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the checkpoints of one `model_type` have in common."""

    architectures: tuple[str, ...]
    windows: Windows = _no_windows
    ropes: Ropes = one_rope
    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    activation_field: str = "hidden_act"
    norm_wide: bool = False
    qk_norm: bool = False
    biases: tuple[bool | None, bool | None, bool | None] = (False, False, False)
    """qkv, out, mlp; None = the config's attention_bias (qkv, out) or mlp_bias."""
    scaled_embedding: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.",)
    """Where the decoder's tensors may begin; the first one that the checkpoint uses counts."""
    ignored: tuple[str, ...] = ()
    """Prefixes of tensors that belong to other parts of the model."""


_GEMMA_DEFAULTS: Mapping[str, object] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    windows=_alternating,
    ropes=gemma3_ropes,
    norms=GEMMA_NORMS,
    activation_field="hidden_activation",
    norm_wide=True,
    qk_norm=True,
    biases=(None, None, False),
    scaled_embedding=True,
    defaults={
        **_GEMMA_DEFAULTS,
        "sliding_window_pattern": 6,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
    prefixes=("model.", "language_model.model.", "model.language_model."),
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
FAMILIES: Mapping[str, Family] = {
    "llama": Family(architectures=("LlamaForCausalLM",), biases=(None, None, None)),
    "mistral": Family(
        architectures=("MistralForCausalLM",),
        windows=_every_layer,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM",),
        windows=_upper_layers,
        biases=(True, False, False),
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        architectures=("Qwen3ForCausalLM",),
        windows=_upper_layers,
        qk_norm=True,
        biases=(None, None, False),
        defaults={"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    ),
    "gemma2": Family(
        architectures=("Gemma2ForCausalLM",),
        windows=_alternating,
        norms=GEMMA_NORMS,
        activation_field="hidden_activation",
        norm_wide=True,
        biases=(None, None, False),
        scaled_embedding=True,
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
}


def parse_config(config: Fields) -> ModelSpec:
    """ModelSpec of a config.json. ConfigError for an unknown family, or naming the field that is wrong."""
    name = config.text("model_type", "unknown")
    architectures = config.texts("architectures")
    family = FAMILIES.get(name)
    if family is None or not set(architectures) <= set(family.architectures):
        supported = sorted({one for row in FAMILIES.values() for one in row.architectures})
        shown = ", ".join(architectures) or "none named"
        raise ConfigError(
            f"{config.source}: model_type {name!r} (architecture: {shown}) is not supported; "
            f"supported are {', '.join(supported)}",
            param="model_type",
        )
    inner = config.section("text_config")
    body = (inner or config).with_defaults(family.defaults)
    for owner in (config, body):
        if owner.section("quantization_config") is not None:
            raise ConfigError(
                f"{config.source}: quantised checkpoints are not supported; use the unquantised one",
                param="quantization_config",
            )
    return _spec(name, family, body)


def _spec(name: str, family: Family, config: Fields) -> ModelSpec:
    layers = config.integer("num_hidden_layers")
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    head_dim = config.integer("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise config.wrong("head_dim", "even")
    activation = config.text(family.activation_field, "silu")
    if activation not in ACTIVATION_NAMES:
        raise config.wrong(family.activation_field, f"one of {', '.join(ACTIVATION_NAMES)}")
    if config.has("use_bidirectional_attention") and config.flag("use_bidirectional_attention", default=False):
        raise config.wrong("use_bidirectional_attention", "false")
    windows = family.windows(config, layers)
    ropes = family.ropes(config, windows)
    attention_bias = config.flag("attention_bias", default=False)
    fallbacks = (attention_bias, attention_bias, config.flag("mlp_bias", default=False))
    qkv_bias, out_bias, mlp_bias = (
        fallback if bias is None else bias for bias, fallback in zip(family.biases, fallbacks, strict=True)
    )
    gemma = family.norms is GEMMA_NORMS
    return ModelSpec(
        family=name,
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_tokens=config.integer("max_position_embeddings"),
        layers=tuple(LayerSpec(rope=rope, window=window) for rope, window in zip(ropes, windows, strict=True)),
        activation=ACTIVATION_NAMES[activation],
        norm_eps=config.number("rms_norm_eps", 1e-6),
        norm_wide=family.norm_wide,
        post_norms=gemma,
        qk_norm=family.qk_norm,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        tied_head=config.flag("tie_word_embeddings", default=False),
        query_scale=config.number("query_pre_attn_scalar", head_dim) ** -0.5,
        embed_scale=hidden**0.5 if family.scaled_embedding else 1.0,
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        final_softcap=config.optional_number("final_logit_softcapping"),
    )
