"""Norms, rotary embedding and gated activations against the formulas of `transformers`."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from baton_kernels.activation import ACTIVATIONS, gated
from baton_kernels.norm import rms_norm, rms_norm_wide
from baton_kernels.rope import RopeSpec, rope_tables, rotate

DTYPES = [torch.float32, torch.bfloat16]


def assert_same(ours, theirs, ulps=1):
    """Equal but for roundings of the last bit of the dtype."""
    assert ours.dtype == theirs.dtype
    step = torch.finfo(ours.dtype).eps * ulps
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_before_the_weight_as_llama(dtype):
    x, weight = 7 * torch.randn(5, 3, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    reference = LlamaRMSNorm(64, eps=1e-3).to(dtype)
    reference.weight.data.copy_(weight)
    before = x.clone()
    assert_same(rms_norm(x, weight, 1e-3), reference(x).detach(), ulps=4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rms_norm_rounds_after_the_weight_as_gemma(dtype):
    x, weight = 7 * torch.randn(5, 3, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    reference = Gemma2RMSNorm(64, eps=1e-3).to(dtype)
    reference.weight.data.copy_(weight)
    assert_same(rms_norm_wide(x, 1.0 + weight.float(), 1e-3), reference(x).detach(), ulps=4)


def test_rms_norm_takes_one_weight_per_head():
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16)
    expected = torch.stack([rms_norm(x[:, head], weight[head], 1e-6) for head in range(3)], dim=1)
    assert_same(rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_equals_transformers(dtype):
    positions = torch.tensor([0, 1, 5, 1000])
    frequencies = RopeSpec(theta=500.0).frequencies(32)
    q, k = torch.randn(4, 3, 32, dtype=dtype), torch.randn(4, 2, 32, dtype=dtype)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    expected = apply_rotary_pos_emb(q, k, angles.cos().to(dtype), angles.sin().to(dtype), unsqueeze_dim=1)
    cos, sin = rope_tables(positions, frequencies, 1.0, dtype)
    assert_same(rotate(q, cos, sin), expected[0], ulps=4)
    assert_same(rotate(k, cos, sin), expected[1], ulps=4)


def test_rotation_leaves_its_input_alone_and_keeps_position_zero():
    x = torch.randn(1, 2, 8)
    before = x.clone()
    cos, sin = rope_tables(torch.tensor([0]), RopeSpec().frequencies(8), 1.0, torch.float32)
    assert torch.equal(rotate(x, cos, sin), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("ours", "theirs"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")])
def test_gated_activation_takes_the_gate_first(ours, theirs):
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    assert_same(gated(torch.cat((gate, up), -1), ACTIVATIONS[ours]), ACT2FN[theirs](gate) * up, ulps=4)
