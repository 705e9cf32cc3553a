"""Queries, keys and values from one projection: the formula of `transformers`, what lands where in a pool of each kind,
and what the kernel refuses to touch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from baton_kernels.capabilities import CPU, named
from baton_kernels.oracle import choices
from baton_kernels.quant import fp8_max
from baton_kernels.rope import rope_tables
from baton_kernels.rope_kv import FAMILY, RopeKvShape, TorchRopeKv, TritonRopeKv
from baton_kernels.rt.language import INTERPRETED
from baton_kernels.rt.program import InputError

interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]
HEADS, KV_HEADS, DIM, PAGE, PAGES, LAYERS = 4, 2, 32, 16, 4, 3
TOTAL = HEADS + 2 * KV_HEADS
FP8 = torch.float8_e4m3fn
CONFIG = {"TILE": 64, "num_warps": 1, "num_stages": 1}


def shape_of(kv_dtype=torch.float32, *, dtype=torch.float32, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, **flags):
    head = PAGE * dim
    strides = (LAYERS * 2 * kv_heads * head, kv_heads * head, head, dim)
    return RopeKvShape(
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_tokens=PAGE,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_strides=strides,
        **flags,
    )


def operation(implementation, shape):
    return TorchRopeKv(shape) if implementation == "torch" else TritonRopeKv(named("sm_90"), shape, CONFIG)


def inputs(shape, tokens=5, *, fill=float("nan"), seed=0):
    """Arguments of a call on the middle layer of a pool that holds `fill`; tokens at random slots, or all on page 1."""
    random = torch.Generator().manual_seed(seed)
    total = shape.heads + 2 * shape.kv_heads
    slots = torch.randperm(PAGES * PAGE, generator=random)[:tokens]
    cos, sin = rope_tables(3 * torch.arange(tokens), torch.rand(shape.dim // 2, generator=random), 1.0, shape.dtype)
    pool = torch.full((PAGES, LAYERS, 2, shape.kv_heads, PAGE, shape.dim), fill).to(shape.kv_dtype)
    given = {
        "qkv": torch.randn(tokens, total, shape.dim, generator=random).to(shape.dtype),
        "cos": cos,
        "sin": sin,
        "kv": pool[:, 1],
        "write_pages": slots // PAGE,
        "write_offsets": slots % PAGE,
    }
    if shape.kv_dtype is torch.int8:
        given["scales"] = torch.full((PAGES, 2, shape.kv_heads, PAGE), float("nan"))
    return given


def stored(pool, given):
    """What lies at the slots of the tokens: keys and values [T, kv_heads, ...]."""
    at = given["write_pages"], given["write_offsets"]
    return tuple(pool[:, which].transpose(1, 2)[at] for which in (0, 1))


def by_transformers(given, norms=None):
    """Queries, keys and values, with the norms of queries and keys before the rotation."""
    q, k, v = given["qkv"].split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    if norms is not None:
        q, k = norms[0](q).detach(), norms[1](k).detach()
    sin = torch.cat((given["sin"], given["sin"]), -1).squeeze(1)
    q, k = apply_rotary_pos_emb(q, k, given["cos"].squeeze(1), sin, unsqueeze_dim=1)
    return q, k, v


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_come_back_and_keys_and_values_lie_at_their_slots(implementation):
    given = inputs(shape_of())
    q, k, v = by_transformers(given)
    out = operation(implementation, shape_of())(**given)
    torch.testing.assert_close(out, q)
    torch.testing.assert_close(stored(given["kv"], given), (k, v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_and_keys_are_normalised_each_with_their_own_weight(implementation):
    shape = shape_of(qk_norm=True)
    given = inputs(shape)
    norms = [Qwen3RMSNorm(DIM, eps=1e-3) for _ in range(2)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 2.0)
    weights = torch.stack([norms[0].weight.data] * HEADS + [norms[1].weight.data] * KV_HEADS)
    q, k, v = by_transformers(given, norms)
    out = operation(implementation, shape)(**given, qk_norm=weights, eps=1e-3)
    torch.testing.assert_close(out, q)
    torch.testing.assert_close(stored(given["kv"], given), (k, v))


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_other_byte_of_the_pool_changes(implementation, kv_dtype):
    shape = shape_of(kv_dtype)
    given = inputs(shape, fill=-128.0)  # no code of an integer pool
    pool = given["kv"]._base
    kept = torch.ones(PAGES, LAYERS, 2, KV_HEADS, PAGE, DIM, dtype=torch.bool)
    for page, offset in zip(given["write_pages"], given["write_offsets"], strict=True):
        kept[page, 1, :, :, offset] = False
    operation(implementation, shape)(**given)
    assert torch.all(pool.float()[kept] == -128.0)
    assert not torch.any(pool.float()[~kept] == -128.0)
    if kv_dtype is torch.int8:
        assert torch.equal(given["scales"].isnan(), kept[:, 1, ..., 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_pool_of_floats_holds_value_over_factor_and_saturates(implementation):
    shape = shape_of(FP8)
    given = inputs(shape)
    given["qkv"][0] *= 1000.0
    _, k, v = by_transformers(given)
    operation(implementation, shape)(**given, k_factor=0.02, v_factor=0.5)
    for codes, values, factor in zip(stored(given["kv"].float(), given), (k, v), (0.02, 0.5), strict=True):
        expected = (values / factor).clamp(-fp8_max(FP8), fp8_max(FP8))
        torch.testing.assert_close(codes, expected, rtol=2**-4, atol=2**-10)  # half a step of the codes
        assert codes.abs().max() == fp8_max(FP8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_pool_of_integers_is_off_by_at_most_half_a_step_and_uses_all_of_them(implementation):
    shape = shape_of(torch.int8)
    given = inputs(shape)
    given["qkv"][1] = 0.0
    given["qkv"][2] *= 1e5
    _, *values = by_transformers(given)
    operation(implementation, shape)(**given)
    for codes, factors, value in zip(stored(given["kv"], given), stored(given["scales"], given), values, strict=True):
        off = (codes.float() * factors.unsqueeze(-1) - value).abs()
        assert torch.all(off <= factors.unsqueeze(-1) * 0.5001)
        assert torch.all(codes[1] == 0)
        assert torch.all(codes[[0, 2, 3, 4]].int().abs().amax(-1) == 127)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels")
@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    dim=st.sampled_from([16, 48, 64, 80]),
    tile=st.sampled_from([32, 64, 1024]),
    tokens=st.integers(0, 3),
)
def test_any_number_of_heads_in_blocks_of_any_size(heads, kv_heads, dim, tile, tokens):
    shape = shape_of(heads=heads, kv_heads=kv_heads, dim=dim)
    ours, theirs = inputs(shape, tokens), inputs(shape, tokens)
    out = TritonRopeKv(named("sm_90"), shape, CONFIG | {"TILE": tile})(**ours)
    torch.testing.assert_close(out, TorchRopeKv(shape)(**theirs))
    torch.testing.assert_close(ours["kv"], theirs["kv"], equal_nan=True)


def test_the_output_is_written_where_it_is_told():
    given, out = inputs(shape_of()), torch.empty(5, HEADS, DIM)
    assert TorchRopeKv(shape_of())(**given, out=out) is out
    torch.testing.assert_close(out, by_transformers(given)[0])


def apart(x):
    """The same numbers, every second element of a wider tensor."""
    return torch.stack((x, x), -1).flatten(-2)[..., ::2]


WRONG = {
    "qkv has shape": lambda given: {"qkv": given["qkv"][:, 1:]},
    "qkv is not contiguous in its last axis": lambda given: {"qkv": apart(given["qkv"])},
    "qkv has heads 64 elements apart": lambda given: {"qkv": torch.zeros(5, TOTAL, 2 * DIM)[..., :DIM]},
    "qkv has rows 257 elements apart": lambda given: {
        "qkv": torch.zeros(5, TOTAL * DIM + 1)[:, : TOTAL * DIM].view(5, TOTAL, DIM)
    },
    "cos has shape": lambda given: {"cos": given["cos"][1:]},
    "sin is not contiguous": lambda given: {"sin": apart(given["sin"])},
    "kv has shape": lambda given: {"kv": given["kv"][..., :8, :]},
    "kv has strides": lambda given: {"kv": given["kv"].contiguous()},
    "write_pages has shape": lambda given: {"write_pages": given["write_pages"][1:]},
    "write_offsets is not contiguous": lambda given: {"write_offsets": apart(given["write_offsets"])},
    "out has shape": lambda given: {"out": torch.empty(5, TOTAL, DIM)},
    "out is not contiguous": lambda given: {"out": torch.empty(HEADS, 5, DIM).transpose(0, 1)},
    "QKV does not start at a multiple of 16 bytes": lambda given: {
        "qkv": torch.zeros(5 * TOTAL * DIM + 1)[1:].view(5, TOTAL, DIM)
    },
}


@pytest.mark.parametrize("says", WRONG)
def test_the_kernel_says_what_is_wrong_with_a_tensor_instead_of_reading_it(says):
    shape = shape_of(qk_norm=True)
    given = inputs(shape) | {"qk_norm": torch.ones(HEADS + KV_HEADS, DIM)}
    with pytest.raises(InputError, match=says):
        TritonRopeKv(named("sm_90"), shape, CONFIG)(**(given | WRONG[says](given)))


@pytest.mark.parametrize(
    ("device", "change", "says"),
    [
        ("sm_90", {"dim": 72}, "heads of 72 elements; multiples of 16 up to 256"),
        ("sm_90", {"dim": 512}, "heads of 512 elements"),
        ("sm_80", {"kv_dtype": FP8}, "a pool of float8_e4m3fn on sm_80, which has no 8-bit floats"),
        ("gfx942", {"kv_dtype": FP8}, "a pool of float8_e4m3fn on gfx942, which has float8_e4m3fnuz"),
        ("sm_90", {"kv_dtype": torch.float16}, "a pool of float16 for a model of float32"),
    ],
)
def test_what_the_kernel_cannot_do_runs_on_the_reference_and_says_why(device, change, says):
    (choice,) = choices(FAMILY, named(device), replace(shape_of(), **change))
    assert choice.implementation == "torch"
    assert choice.slow
    assert says in choice.reason


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_the_kernel_runs_on_every_gpu_with_the_devices_own_floats(device):
    capabilities = named(device)
    for kv_dtype in filter(None, (torch.bfloat16, torch.int8, capabilities.fp8)):
        shape = shape_of(kv_dtype, dtype=torch.bfloat16)
        assert choices(FAMILY, capabilities, shape)[0].implementation == "triton"
    assert choices(FAMILY, CPU, shape_of())[0].implementation == "torch"
