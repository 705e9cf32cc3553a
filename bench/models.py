"""Model shapes that benchmarks use. Weights are random: speed does not depend on their values."""

from __future__ import annotations

from typing import Any

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def linear_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(out, in) of every weight matrix that one decode step streams, in order, the output head last."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = [
        ((heads + 2 * kv_heads) * head, hidden),
        (hidden, heads * head),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    return layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]


def flops_per_prompt_token(config: dict[str, Any], prompt_tokens: int) -> float:
    """Multiply-adds counted twice; weights of all layers, and causal attention at the mean context. No output head."""
    weights = sum(out * into for out, into in linear_shapes(config)[:-1])
    width = config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
    return 2.0 * weights + 2 * 2 * width * prompt_tokens / 2
