"""Paged attention against a dense float64 formula: any page table, any mix of rows, garbage behind every row's end."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_kernels.attention.reference import paged_attention, plan_attention
from baton_kernels.attention.shape import Scores
from baton_kernels.rope_kv import write_kv

PAGE = 16
HEADS, GROUP, DIM = 2, 3, 8


def dense(q, k, v, start, scores):
    """One row in float64: q [n, Hq, D] at positions start.., k and v [L, Hkv, D]."""
    count, tokens = q.shape[0], k.shape[0]
    k = k.double().repeat_interleave(GROUP, dim=1)
    v = v.double().repeat_interleave(GROUP, dim=1)
    raw = torch.einsum("qhd,khd->hqk", q.double(), k) * scores.scale
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    at, token = torch.arange(start, start + count)[:, None], torch.arange(tokens)[None]
    seen = token <= at
    if scores.window is not None:
        seen &= token > at - scores.window
    raw = raw.masked_fill(~seen, float("-inf"))
    if scores.sinks is not None:
        raw = torch.cat((raw, scores.sinks.double()[:, None, None].expand(-1, count, 1)), dim=-1)
    weights = raw.softmax(-1)[..., :tokens]
    return torch.einsum("hqk,khd->qhd", weights, v)


def check(rows, scores, *, dtype=torch.float32, seed=0, page=PAGE, tolerance=2e-5):
    """rows: (queries, tokens) pairs, laid out on shuffled pages of a pool full of NaN."""
    random = torch.Generator().manual_seed(seed)
    pages = [-(-tokens // page) for _, tokens in rows]
    order = torch.randperm(sum(pages) + 3, generator=random).tolist()
    pool = torch.full((sum(pages) + 3, 2, 2, HEADS, page, DIM), float("nan"), dtype=dtype)
    kv = pool[:, 1]
    table = torch.full((len(rows), max(pages) + 1), sum(pages) + 2, dtype=torch.int32)
    queries, expected, cu_q = [], [], [0]
    for index, (count, tokens) in enumerate(rows):
        mine = [order.pop() for _ in range(pages[index])]
        table[index, : len(mine)] = torch.tensor(mine)
        k, v = (torch.randn(tokens, HEADS, DIM, generator=random).to(dtype) for _ in range(2))
        q = torch.randn(count, HEADS * GROUP, DIM, generator=random).to(dtype)
        at = torch.arange(tokens)
        write_kv(k, v, kv, torch.tensor(mine)[at // page], at % page)
        expected.append(dense(q, k, v, tokens - count, scores))
        queries.append(q)
        cu_q.append(cu_q[-1] + count)
    plan = plan_attention(table, cu_q, [tokens for _, tokens in rows], page)
    out = paged_attention(torch.cat(queries), kv, plan, scores)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


SCALE = DIM**-0.5
KINDS = {
    "plain": Scores(scale=SCALE),
    "window": Scores(scale=SCALE, window=21),
    "softcap": Scores(scale=0.5, softcap=2.0),
    "window and softcap": Scores(scale=0.5, window=5, softcap=2.0),
    "sinks": Scores(scale=SCALE, sinks=torch.linspace(-2, 2, HEADS * GROUP)),
    "all": Scores(scale=SCALE, window=33, softcap=3.0, sinks=torch.linspace(-1, 3, HEADS * GROUP)),
}
BATCHES = {
    "decode": [(1, 1), (1, 16), (1, 17), (1, 70)],
    "whole prompts": [(1, 1), (16, 16), (45, 45)],
    "chunks on a cached prefix": [(7, 40), (16, 32), (5, 21)],
    "mixed": [(1, 33), (20, 20), (3, 50), (1, 5)],
    "uniform": [(4, 4), (4, 35), (4, 64)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_dense_formula_on_a_poisoned_pool(batch, kind):
    check(BATCHES[batch], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_longer_than_every_block(kind):
    check([(1, 1000), (300, 700), (600, 600)], KINDS[kind], page=64)


@pytest.mark.parametrize("batch", BATCHES)
def test_bfloat16_pools_stay_within_their_rounding(batch):
    check(BATCHES[batch], KINDS["plain"], dtype=torch.bfloat16, tolerance=2e-2)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 60)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 70),
    page=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**31),
)
def test_any_batch_any_window(rows, window, page, seed):
    check([(n, n + before) for n, before in rows], Scores(scale=SCALE, window=window), page=page, seed=seed)


def test_a_row_without_queries_is_skipped():
    kv = torch.randn(3, 2, HEADS, PAGE, DIM)
    q = torch.randn(1, HEADS * GROUP, DIM)
    table = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    some = plan_attention(table, (0, 0, 1, 1), (0, 9, 4), PAGE)
    alone = plan_attention(table[1:2], (0, 1), (9,), PAGE)
    torch.testing.assert_close(
        paged_attention(q, kv, some, KINDS["plain"]), paged_attention(q, kv, alone, KINDS["plain"])
    )


def test_a_row_that_does_not_fit_in_its_page_table_is_a_defect():
    with pytest.raises(AssertionError, match="17 tokens do not fit in 1 pages"):
        plan_attention(torch.zeros(1, 1, dtype=torch.int32), (0, 1), (17,), PAGE)


def test_writes_touch_only_their_slots():
    kv = torch.zeros(4, 2, HEADS, PAGE, DIM)
    k, v = torch.ones(2, HEADS, DIM), torch.full((2, HEADS, DIM), 2.0)
    write_kv(k, v, kv, torch.tensor([3, 1]), torch.tensor([0, 15]))
    assert (kv[3, 0, :, 0] == 1).all()
    assert (kv[1, 1, :, 15] == 2).all()
    assert kv.sum() == 2 * HEADS * DIM * 3


# ---- narrow KV, trees, sums -----------------------------------------------------------------------------------------
def attend(batch, scores, *, tree=None, scales=None, kv=None, seed=0):
    """The reference on one row per (queries, tokens) whose KV is `kv` or random; also what it computed from."""
    random = torch.Generator().manual_seed(seed)
    pages = [-(-tokens // PAGE) for _, tokens in batch]
    table = torch.arange(sum(pages), dtype=torch.int32).split(pages)
    padded = torch.nn.utils.rnn.pad_sequence(list(table), batch_first=True)
    if kv is None:
        kv = torch.randn(sum(pages), 2, HEADS, PAGE, DIM, generator=random)
    cu_q = [0, *torch.tensor([count for count, _ in batch]).cumsum(0).tolist()]
    q = torch.randn(cu_q[-1], HEADS * GROUP, DIM, generator=random)
    lse = torch.empty(cu_q[-1], HEADS * GROUP)
    plan = plan_attention(padded, cu_q, [tokens for _, tokens in batch], PAGE)
    out = paged_attention(q, kv, plan, scores, kv_scales=scales, tree=tree, lse=lse)
    return q, kv, out, lse


def row_of(kv, tokens):
    """K and V [tokens, Hkv, D] of the first row."""
    flat = kv.transpose(2, 3)
    return tuple(flat[:, half].reshape(-1, HEADS, DIM)[:tokens] for half in (0, 1))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
def test_the_log_sum_is_to_base_two(kind, queries):
    scores = KINDS[kind]
    q, kv, out, lse = attend([(queries, 40)], scores)
    k, v = row_of(kv, 40)
    weights_of_ones = dense(q, k, torch.ones_like(v), 40 - queries, scores)[..., 0]  # below one where a sink takes
    k = k.double().repeat_interleave(GROUP, dim=1)
    raw = torch.einsum("qhd,khd->qhk", q.double(), k) * scores.scale
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    at, token = torch.arange(40 - queries, 40)[:, None], torch.arange(40)
    seen = (token <= at) & (token > at - (scores.window or 100))
    sums = raw.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), (sums - weights_of_ones.log()) / math.log(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), dense(q, *row_of(kv, 40), 40 - queries, scores), rtol=1e-4, atol=1e-5)


def test_a_node_of_a_tree_sees_the_prefix_and_its_ancestors():
    """Prefix, then two drafts of two tokens each behind one root: 0 - 1 - 2 and 0 - 3 - 4."""
    ancestors = [{0}, {0, 1}, {0, 1, 2}, {0, 3}, {0, 3, 4}]
    tree = torch.tensor([sum(1 << node for node in path) for path in ancestors])
    q, kv, out, _ = attend([(5, 25)], KINDS["plain"], tree=tree)
    k, v = row_of(kv, 25)
    for node, path in enumerate(ancestors):
        chosen = [*range(20), *(20 + one for one in sorted(path))]
        alone = dense(q[node : node + 1], k[chosen], v[chosen], len(chosen) - 1, KINDS["plain"])
        torch.testing.assert_close(out[node : node + 1].double(), alone, rtol=1e-4, atol=1e-5)


def test_the_depth_of_a_node_is_its_place_in_the_window():
    tree = torch.tensor([0b001, 0b010, 0b100])  # three roots: each is the token right behind the prefix
    q, kv, out, _ = attend([(3, 103)], Scores(scale=SCALE, window=64), tree=tree)
    k, v = row_of(kv, 103)
    for node in range(3):
        chosen = [*range(37, 100), 100 + node]
        alone = dense(q[node : node + 1], k[chosen], v[chosen], 63, KINDS["plain"])
        torch.testing.assert_close(out[node : node + 1].double(), alone, rtol=1e-4, atol=1e-5)


def test_a_tree_without_branches_is_causal():
    batch = [(70, 90), (4, 9), (1, 30)]
    every = torch.full((75,), -1)
    scores = Scores(scale=SCALE, window=66)
    torch.testing.assert_close(attend(batch, scores, tree=every)[2], attend(batch, scores)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("batch", [[(1, 37)], [(6, 37), (1, 20)]])
def test_narrow_kv_is_what_its_codes_stand_for(dtype, batch):
    pages = sum(-(-tokens // PAGE) for _, tokens in batch)
    random = torch.Generator().manual_seed(5)
    values = torch.randn(pages, 2, HEADS, PAGE, DIM, generator=random)
    if dtype is torch.int8:
        scales = values.abs().amax(-1) / 127
        codes = (values / scales.unsqueeze(-1)).round().to(torch.int8)
        meant = codes.float() * scales.unsqueeze(-1)
    else:
        scales = torch.tensor([0.1, 0.03])
        codes = (values / scales.view(1, 2, 1, 1, 1)).clamp(-448, 448).to(dtype)
        meant = codes.float() * scales.view(1, 2, 1, 1, 1)
    narrow = attend(batch, KINDS["plain"], kv=codes, scales=scales)[2]
    torch.testing.assert_close(narrow, attend(batch, KINDS["plain"], kv=meant)[2], rtol=1e-4, atol=1e-5)
