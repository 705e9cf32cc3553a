"""Tiny Hugging Face checkpoints with random weights, one per family: config, weights, tokenizer, chat template.

Written with numpy alone, so that tests of the router need no torch. The names and shapes are the families' own, and
`transformers` loads the same folders, which is what makes it the reference. Logits come out with a spread of about one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTES_FIRST_ID = len(SPECIALS)
MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c", "i t", "i s",
    "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġa n", "a l", "a r", "Ġt o", "Ġ m", "Ġo f",
    "Ġ in", "Ġ d", "Ġ h", "Ġan d",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

BASE: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
GEMMA: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32,
    "sliding_window": 24,
    "attention_bias": False,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 16, "sliding_window": 24},
    "gemma2": {
        **GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3": {
        **GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_theta": 100000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_checkpoint(family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES) into `folder` and return it.

    `overrides` replace entries of config.json; a value of None removes the entry. Weights depend on `seed` alone.
    Stop token of generation: `<|end|>`, id EOS_ID. `dtype`: float32 or bfloat16.
    """
    config = {**BASE, **FAMILIES[family], "torch_dtype": dtype, **overrides}
    config = {key: value for key, value in config.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID], "pad_token_id": PAD_ID, "do_sample": False},
    )
    write_safetensors(folder / "model.safetensors", dict(random_weights(config, seed)), dtype)
    write_tokenizer(folder, config["vocab_size"], config["max_position_embeddings"])
    return folder


def random_weights(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of every tensor of a checkpoint with this config.

    Queries are sharp and layers louder than embeddings: a plain random model attends to everything alike and, with a
    tied head, repeats its last token, so that a wrong cache would go unseen.
    """
    random = np.random.default_rng(seed)
    gemma = config["model_type"].startswith("gemma")
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", hidden // heads)

    spread = config.get("initializer_range")
    gains = {"q_proj": 3.0, "o_proj": 3.0, "down_proj": 3.0}
    loud = 3.0 if spread is None else 1.0

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        scale = spread or gain / columns**0.5
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    def norm(size: int, gain: float = 1.0) -> np.ndarray:
        return gain + 0.2 * random.standard_normal(size, dtype=np.float32) - (1.0 if gemma else 0.0)

    def linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{name}.weight", matrix(rows, columns, gains.get(name.rpartition(".")[2], 1.0))
        if bias:
            yield f"{name}.bias", 0.3 * random.standard_normal(rows, dtype=np.float32)

    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    out_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from linear(f"{at}.self_attn.q_proj", heads * dim, hidden, bias=qkv_bias)
        yield from linear(f"{at}.self_attn.k_proj", kv_heads * dim, hidden, bias=qkv_bias)
        yield from linear(f"{at}.self_attn.v_proj", kv_heads * dim, hidden, bias=qkv_bias)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * dim, bias=out_bias)
        if config["model_type"] in ("qwen3", "gemma3_text"):
            yield f"{at}.self_attn.q_norm.weight", norm(dim, loud)
            yield f"{at}.self_attn.k_norm.weight", norm(dim)
        yield from linear(f"{at}.mlp.gate_proj", inter, hidden, bias=mlp_bias)
        yield from linear(f"{at}.mlp.up_proj", inter, hidden, bias=mlp_bias)
        yield from linear(f"{at}.mlp.down_proj", hidden, inter, bias=mlp_bias)
        yield f"{at}.input_layernorm.weight", norm(hidden)
        yield f"{at}.post_attention_layernorm.weight", norm(hidden, loud if gemma else 1.0)
        if gemma:
            yield f"{at}.pre_feedforward_layernorm.weight", norm(hidden)
            yield f"{at}.post_feedforward_layernorm.weight", norm(hidden, loud)
    yield "model.norm.weight", norm(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", matrix(config["vocab_size"], hidden)


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """One safetensors file, from the format's own description; values are rounded to bfloat16 when asked for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    end = 0
    for name, values in weights.items():
        raw = values.astype("<f4")
        if dtype == "bfloat16":
            bits = raw.view(np.uint32)
            raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        chunks.append(raw.tobytes())
        begin, end = end, end + len(chunks[-1])
        code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(chunks))


def write_tokenizer(folder: Path, vocab_size: int, max_tokens: int) -> None:
    """Byte-level BPE with a few English merges; every id below `vocab_size` decodes to something."""
    room = vocab_size - len(SPECIALS)
    if room < 256:
        raise ValueError(f"a byte-level vocabulary needs {256 + len(SPECIALS)} ids, got {vocab_size}")
    merges = [tuple(merge.split(" ")) for merge in MERGES[: room - 256]]
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    pieces += [f"Ġextra{index}" for index in range(vocab_size - len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
