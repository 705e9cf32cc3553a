"""Absorbed latent attention is attention over the projected keys and values; what its kernel refuses, plans, checks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_kernels import configs
from baton_kernels.attention.latent import LATENT, ROPE, WIDTH, TorchLatent, make, model, shape_of
from baton_kernels.attention.mla import FAMILY, TritonLatent
from baton_kernels.attention.work import RECORD, Capacity
from baton_kernels.capabilities import CPU, named
from baton_kernels.oracle import Unsupported, choices
from baton_kernels.rt.program import InputError

HERE = torch.device("cpu")
GPUS = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
SHAPE = shape_of(4, 16, dtype=torch.float32)


def call(batch, shape=SHAPE, seed=0):
    return dict(make(shape, batch, torch.Generator().manual_seed(seed), HERE).arguments)


def kernel(shape, device="sm_90"):
    capabilities = named(device)
    return TritonLatent(capabilities, shape, configs.find("mla", capabilities, shape.label).config)


def rows_of(arguments, batch):
    """(first query, queries, latents and rotary keys [tokens, 576]) of each row."""
    plan, begin = arguments["plan"], 0
    for index, (count, tokens) in enumerate(batch):
        pages = plan.page_table[index, : -(-tokens // SHAPE.page_tokens)]
        yield begin, count, arguments["kv"][pages.long(), 0, 0].reshape(-1, WIDTH)[:tokens].double()
        begin += count


# ---- what it computes -----------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_absorbed_equals_attention_over_projected_keys_and_values(batch, seed):
    """Pages are shuffled, and full of NaN behind each row's last token."""
    batch = [(count, count + before) for count, before in batch]
    arguments = call(batch, seed=seed)
    random = torch.Generator().manual_seed(seed)
    to_keys, to_values = torch.randn(2, 4, 24, LATENT, generator=random, dtype=torch.float64) / 8
    queries = torch.randn(arguments["q"].shape[0], 4, 24, generator=random, dtype=torch.float64)
    rotary = arguments["q"][..., LATENT:].double()
    arguments["q"] = torch.cat((torch.einsum("thn,hnl->thl", queries, to_keys), rotary), -1).float()
    got = TorchLatent(SHAPE)(**arguments).double()
    for begin, count, cached in rows_of(arguments, batch):
        latent, rotary_keys = cached.split((LATENT, ROPE), -1)
        keys = torch.einsum("kl,hnl->khn", latent, to_keys)
        values = torch.einsum("kl,hnl->khn", latent, to_values)
        mine = slice(begin, begin + count)
        raw = torch.einsum("qhn,khn->hqk", queries[mine], keys)
        raw += torch.einsum("qhr,kr->hqk", rotary[mine], rotary_keys)
        unseen = torch.ones(count, len(cached)).tril(len(cached) - count) == 0
        weights = (raw * arguments["scale"]).masked_fill(unseen, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khn->qhn", weights, values)
        projected = torch.einsum("qhl,hnl->qhn", got[mine], to_values)
        torch.testing.assert_close(projected, expected, atol=2e-4, rtol=2e-4)


def test_lse_is_the_logarithm_to_base_two_of_the_sum_of_exponentials():
    arguments = call([(1, 21)])
    TorchLatent(SHAPE)(**arguments)
    (_, _, cached), = rows_of(arguments, [(1, 21)])  # fmt: skip
    scores = torch.einsum("hd,kd->hk", arguments["q"][0].double(), cached) * arguments["scale"]
    torch.testing.assert_close(arguments["lse"][0].double(), scores.exp().sum(-1).log2(), atol=1e-4, rtol=1e-4)


def test_the_factor_of_an_8_bit_cache_scales_keys_and_values():
    codes = shape_of(4, 16, dtype=torch.float32, kv_dtype=torch.float8_e4m3fn)
    arguments = call([(2, 40)], codes)
    plain = dict(arguments, kv=arguments["kv"].float() * 0.5, factor=1.0, out=None, lse=None)
    torch.testing.assert_close(TorchLatent(codes)(**arguments), TorchLatent(SHAPE)(**plain))


def test_query_tokens_outside_the_rows_are_left_as_they_are():
    arguments = call([(1, 5), (1, 9)])
    arguments["out"].fill_(7.0)
    arguments["plan"] = replace(arguments["plan"], cu_q_host=(1, 1, 2))
    TorchLatent(SHAPE)(**arguments)
    assert (arguments["out"][0] == 7.0).all()
    assert (arguments["out"][1] != 7.0).any()


def test_deepseek_decode_is_bound_by_products_not_by_memory():
    """128 heads: 242 operations for each byte of a long row, more than any of our devices can do."""
    traffic = model(shape_of(128), [(1, 65536)])
    assert traffic.flops / traffic.bytes == pytest.approx(242, rel=0.01)


# ---- where it runs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", GPUS)
def test_every_gpu_runs_the_kernel(device):
    assert choices(FAMILY, named(device), shape_of(128))[0].implementation == "triton"


def test_a_cpu_runs_the_reference():
    assert [one.implementation for one in choices(FAMILY, CPU, shape_of(128))] == ["torch"]


@pytest.mark.parametrize(
    ("device", "shape", "reason"),
    [
        ("sm_90", shape_of(16, dtype=torch.float32), "queries of torch.float32 are neither bfloat16 nor float16"),
        ("sm_90", shape_of(16, kv_dtype=torch.int8), "KV of torch.int8 with queries of torch.bfloat16"),
        ("sm_80", shape_of(16, kv_dtype=torch.float8_e4m3fn), "sm_80 has no 8-bit floats"),
        ("gfx942", shape_of(16, kv_dtype=torch.float8_e4m3fn), "gfx942 has torch.float8_e4m3fnuz"),
        ("sm_90", shape_of(16, 24), "pages of 24 tokens are no multiple of 16"),
        ("sm_90", shape_of(16, 256), "pages of 256 tokens are no multiple of 16 up to 128"),
        ("sm_90", replace(shape_of(16), kv_strides=(64 * 580, 580)), "KV strides .* are not multiples of 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(device, shape, reason):
    with pytest.raises(Unsupported, match=reason):
        choices(FAMILY, named(device), shape, {"mla": "triton"})


@pytest.mark.parametrize(
    ("heads", "row_tokens", "label"),
    [
        (128, 1, "m64"),
        (128, 4, "m64"),
        (64, 1, "m64"),
        (32, 1, "m32"),
        (16, 1, "m16"),
        (16, 4, "m64-mixed"),
        (20, 1, "m32-mixed"),
        (8, 1, "m16-mixed"),
    ],
)
def test_tiles_are_as_large_as_a_row_fills(heads, row_tokens, label):
    assert shape_of(heads, row_tokens=row_tokens).label == label
    fp8 = shape_of(heads, row_tokens=row_tokens, kv_dtype=torch.float8_e4m3fn)
    assert fp8.label == f"{label}-fp8"


@pytest.mark.parametrize("device", ["sm_90", "sm_100", "gfx942", "gfx950"])
@pytest.mark.parametrize("page_tokens", [16, 48, 64, 80, 128])
def test_a_block_of_kv_never_crosses_a_page(device, page_tokens):
    assert page_tokens % kernel(shape_of(128, page_tokens), device).tiling.block_n == 0


# ---- plans ----------------------------------------------------------------------------------------------------------
def batch_arguments(batch, page_tokens=64, columns=64):
    cu_q = [0]
    for count, _ in batch:
        cu_q.append(cu_q[-1] + count)
    table = torch.zeros(len(batch), columns, dtype=torch.int32)
    lengths = [tokens for _, tokens in batch]
    return table, torch.tensor(cu_q), torch.tensor(lengths), cu_q, lengths


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4000)), max_size=8))
def test_with_a_capacity_every_step_has_the_same_buffers_and_grids(batch):
    batch = [(count, max(count, tokens)) for count, tokens in batch]
    operation = kernel(shape_of(16, row_tokens=3))
    capacity = Capacity(rows=8, tokens=24, row_tokens=3, kv_tokens=4096)
    plan = operation.plan(*batch_arguments(batch), capacity=capacity)
    empty = operation.plan(*batch_arguments([]), capacity=capacity)
    assert plan.units.shape == empty.units.shape
    assert plan.reductions.shape == empty.reductions.shape
    assert plan.partials.shape == empty.partials.shape
    assert plan.row_tokens == empty.row_tokens == 3
    slots = plan.units.view(-1, RECORD)[1 : 1 + int(plan.units[0]), 7]
    assert (slots < len(plan.partials)).all()


def test_equal_rows_that_fill_the_device_are_not_split():
    """Partial states of 64 x 512 are dear: 64 rows of 128 heads are 128 tiles for 132 units."""
    plan = kernel(shape_of(128)).plan(*batch_arguments([(1, 4096)] * 64))
    assert plan.reductions is None
    assert plan.units[0] == 128


def test_one_long_row_is_split_over_the_device():
    plan = kernel(shape_of(128)).plan(*batch_arguments([(1, 65536)], columns=1024))
    assert plan.reductions is not None
    assert 100 <= plan.units[0] <= 132


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([(1, 9), (3, 2)], "row 1 has 3 queries but 2 tokens"),
        ([(1, 65 * 64)], "row 0: 4160 tokens do not fit in 64 pages"),
        ([(1, 1)] * 5, "5 rows of 5 tokens, up to 1 each, exceed"),
        ([(3, 3)], "1 rows of 3 tokens, up to 3 each, exceed"),
    ],
)
def test_a_step_that_cannot_be_planned_is_said(batch, message):
    capacity = Capacity(rows=4, tokens=8, row_tokens=2, kv_tokens=4096) if "exceed" in message else None
    with pytest.raises(InputError, match=message):
        kernel(shape_of(16)).plan(*batch_arguments(batch), capacity=capacity)


# ---- bad input ------------------------------------------------------------------------------------------------------
def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def float32(tensor):
    return tensor.float()


def shorter(tensor):
    return tensor[..., :-1]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", transposed, "q has strides"),
        ("q", float32, "q is torch.float32, expected torch.bfloat16"),
        ("q", shorter, r"q has shape \[2, 16, 575\]"),
        ("kv", shorter, "kv has shape"),
        ("kv", float32, "kv is torch.float32"),
        ("kv", torch.Tensor.contiguous, "kv has strides .* the kernel is made for"),
        ("out", transposed, "out is not contiguous"),
        ("out", shorter, "out has shape"),
        ("lse", shorter, "lse has shape"),
        ("lse", torch.Tensor.double, "lse is torch.float64"),
    ],
)
def test_a_wrong_tensor_is_named(name, change, message):
    shape = shape_of(16, 16)
    arguments = call([(1, 5), (1, 40)], shape)
    with pytest.raises(InputError, match=message):
        kernel(shape)(**arguments | {name: change(arguments[name])})
