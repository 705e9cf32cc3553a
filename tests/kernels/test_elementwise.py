"""Norms, rotary embedding and gated activations against the formulas of `transformers`; what their kernels refuse."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from baton_kernels import activation, norm
from baton_kernels.activation import ACTIVATIONS, GatedShape, TorchGated, TritonGated, gated
from baton_kernels.capabilities import CPU, named
from baton_kernels.norm import NormShape, TorchNorm, TritonNorm, rms_norm, rms_norm_wide
from baton_kernels.oracle import choices
from baton_kernels.quant import fp8_max, int8_codes
from baton_kernels.rope import RopeSpec, rope_tables, rotate
from baton_kernels.rt.check import lanes
from baton_kernels.rt.program import InputError

DTYPES = [torch.float32, torch.bfloat16]
FP8 = torch.float8_e4m3fn


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
    # 1 + erf cancels for negative gates, and erf rounds differently for whole vectors and for what is left over.
    assert_same(gated(torch.cat((gate, up), -1), ACTIVATIONS[ours]), ACT2FN[theirs](gate) * up, ulps=16)


def test_the_operations_write_where_they_are_told():
    x, weight, gate_up = torch.randn(3, 8), torch.randn(8), torch.randn(3, 16)
    out = torch.empty(3, 8)
    assert TorchNorm(NormShape(width=8, dtype=torch.float32))(x, weight, 1e-6, out=out) is out
    assert_same(out, rms_norm(x, weight, 1e-6))
    assert TorchGated(GatedShape(width=8, dtype=torch.float32, kind="gelu"))(gate_up, out=out) is out
    assert_same(out, gated(gate_up, ACTIVATIONS["gelu"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_a_group_use_its_whole_range_and_are_off_by_half_a_step(dtype):
    gate_up = torch.randn(4, 2 * 384, dtype=dtype)
    gate_up[0] = 0.0
    gate_up[1] *= 100.0
    codes, scales = torch.empty(4, 384, dtype=FP8), torch.empty(4, 3)
    TorchGated(GatedShape(width=384, dtype=dtype, quantised=True))(gate_up, out=codes, scales=scales)
    exact = gated(gate_up.double(), ACTIVATIONS["silu"])
    value = (codes.float().view(4, 3, 128) * scales.unsqueeze(-1)).view(4, 384)
    smallest_step = 2.0**-9 * scales.repeat_interleave(128, 1)
    assert torch.all((value - exact).abs() <= torch.maximum(exact.abs() * 2**-4, smallest_step))
    assert torch.all(codes[0].float() == 0.0)
    assert torch.all(codes[1:].float().abs().view(3, 3, 128).amax(-1) == fp8_max(FP8))


def test_integer_codes_are_symmetric_and_a_row_of_zeros_stays_zero():
    x = torch.tensor([[3.0, -3.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = int8_codes(x)
    assert codes.tolist() == [[127, -127, 64, 0], [0, 0, 0, 0]]  # 63.5 rounds to even
    assert scales[0] * 127 == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("width", "dtypes", "elements"),
    [
        (4096, (torch.bfloat16,), 8),
        (4096, (torch.float32,), 4),
        (4096, (torch.bfloat16, FP8), 16),
        (100, (torch.bfloat16,), 4),
        (99, (torch.bfloat16,), 1),
    ],
)
def test_rows_are_promised_to_start_where_a_whole_access_of_16_bytes_can(width, dtypes, elements):
    assert lanes(width, *dtypes) == elements


def wide_rows(width, gap, dtype=torch.float32):
    """Three rows that lie `gap` elements apart."""
    return torch.zeros(3, width + gap, dtype=dtype)[:, :width]


WRONG_NORM = {
    "x has shape": {"x": torch.zeros(3, 200)},
    "x is not contiguous": {"x": torch.zeros(3, 512)[:, ::2]},
    "x has rows 257 elements apart, expected a multiple of 16": {"x": wide_rows(256, 1)},
    "residual has rows 260 elements apart": {"residual": wide_rows(256, 4)},
    "out has rows 264 elements apart": {"out": wide_rows(256, 8, FP8)},
    "weight has shape": {"weight": torch.zeros(3, 256)},
    "scales has shape": {"scales": torch.zeros(3, 1)},
    "scales is not contiguous": {"scales": torch.zeros(3, 4)[:, :2]},
    "X does not start at a multiple of 16 bytes": {"x": torch.zeros(3 * 256 + 1)[1:].view(3, 256)},
}


@pytest.mark.parametrize("says", WRONG_NORM)
def test_the_norm_kernel_says_what_is_wrong_with_a_tensor(says):
    given = {
        "x": torch.zeros(3, 256),
        "weight": torch.ones(256),
        "eps": 1e-6,
        "residual": torch.zeros(3, 256),
        "out": torch.zeros(3, 256, dtype=FP8),
        "scales": torch.zeros(3, 2),
    }
    shape = NormShape(width=256, dtype=torch.float32, residual=True, quantised=True)
    with pytest.raises(InputError, match=says):
        TritonNorm(named("sm_90"), shape, {"num_warps": 1})(**(given | WRONG_NORM[says]))


WRONG_GATED = {
    "gate_up has shape": {"gate_up": torch.zeros(3, 256)},
    "gate_up has rows 514 elements apart": {"gate_up": wide_rows(512, 2)},
    "out has shape": {"out": torch.zeros(2, 256, dtype=FP8)},
    "scales is not contiguous": {"scales": torch.zeros(2, 3).T},
}


@pytest.mark.parametrize("says", WRONG_GATED)
def test_the_gated_kernel_says_what_is_wrong_with_a_tensor(says):
    given = {
        "gate_up": torch.zeros(3, 512),
        "out": torch.zeros(3, 256, dtype=FP8),
        "scales": torch.zeros(3, 2),
    }
    shape = GatedShape(width=256, dtype=torch.float32, quantised=True)
    with pytest.raises(InputError, match=says):
        TritonGated(named("sm_90"), shape, {"BLOCK": 256, "num_warps": 1})(**(given | WRONG_GATED[says]))


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_kind_has_a_kernel_on_every_gpu(kind, device):
    shape = GatedShape(width=100, dtype=torch.bfloat16, kind=kind)
    assert choices(activation.FAMILY, named(device), shape)[0].implementation == "triton"
    assert choices(activation.FAMILY, CPU, shape)[0].implementation == "torch"


@pytest.mark.parametrize(
    ("family", "device", "shape", "says"),
    [
        (
            activation.FAMILY,
            "sm_80",
            GatedShape(width=256, dtype=torch.bfloat16, quantised=True),
            "sm_80 has no 8-bit floats",
        ),
        (
            activation.FAMILY,
            "sm_90",
            GatedShape(width=200, dtype=torch.bfloat16, quantised=True),
            "a width of 200 has no whole groups of 128",
        ),
        (
            norm.FAMILY,
            "sm_90",
            NormShape(width=20000, dtype=torch.bfloat16),
            "rows of 20000 elements do not fit in one program; 16384 do",
        ),
    ],
)
def test_what_a_kernel_cannot_do_runs_on_the_reference_and_says_why(family, device, shape, says):
    (choice,) = choices(family, named(device), shape)
    assert choice.implementation == "torch"
    assert says in choice.reason
