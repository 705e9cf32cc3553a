"""Floors of whole steps of a dense decoder: the sum over its operations, which run one after another.

A product is limited by its weights or by its flops, decode attention by the KV that it reads, prefill attention by its
flops. Norms, rotary embedding and activations count nothing in prefill: they can be fused. In a decode step the traffic
of activations counts, unfused; it is under a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton_kernels.registry import Traffic
from bench.gpu.ceilings import Ceilings
from bench.models import linear_shapes

Shape = Mapping[str, Any]
BF16 = 2  # bytes


def kv_token_bytes(shape: Shape) -> int:
    """Of one token in all layers."""
    return 2 * BF16 * int(shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"])


def decode_floor_s(shape: Shape, batch: int, context: int, ceilings: Ceilings) -> float:
    """Of one step in which each of `batch` requests with `context` tokens gets one more."""
    weights = sum(out * into for out, into in linear_shapes(dict(shape)))
    products, _ = ceilings.floor(Traffic(bytes=weights * BF16, flops=2 * weights * batch))
    cached = batch * context * kv_token_bytes(shape)
    return products + (cached + batch * _activation_bytes(shape)) / (ceilings.copy_gbps * 1e9)


def prefill_floor_s(shape: Shape, tokens: int, ceilings: Ceilings) -> float:
    """Of one causal pass over a prompt. The output head sees one token and counts nothing."""
    weights = sum(out * into for out, into in linear_shapes(dict(shape))[:-1])
    width = shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    flops = 2 * weights * tokens + 2 * width * tokens**2
    return float(flops / (ceilings.bf16_tflops * 1e12))


def _activation_bytes(shape: Shape) -> int:
    """Of one token in all layers: two norms with their residuals, q, k and v with rotation, gate and up."""
    heads = shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    layer = 8 * shape["hidden_size"] + 2 * heads * shape["head_dim"] + 3 * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer * BF16)
