"""Attention over paged KV: the torch reference. It is the CPU path and the oracle of every kernel.

A row's pages are copied, never the pool: page by page into a small scratch, cut off at the row's length. What lies in a
page behind that length (an earlier owner's bytes, NaN) is therefore never multiplied, not even by zero.
Rows with one query are computed in float32, heads grouped so that KV is not repeated; longer rows go through torch's
fused attention in blocks of queries, or through plain matrix products when scores must be changed (softcap, sinks).
It does not know requests, forms of steps, or who owns a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from baton_kernels.attention.partials import LOG2_E
from baton_kernels.attention.shape import TREE_TOKENS, AttentionShape, Rows, Scores, Upload
from baton_kernels.attention.work import Capacity
from baton_kernels.rt.check import wide
from baton_kernels.rt.program import Program

BLOCK_TOKENS = 256
"""KV tokens of one scratch block of a single query, so that float32 copies stay in a core's cache."""
QUERY_BLOCK = 256
"""Queries that share one mask; a block sees only the KV up to its own end."""
SCORE_BUDGET = 1 << 23
"""Scores held at once where they are materialised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """Query tokens [q_begin, q_end) of the batch are the last ones of a row with `kv_tokens` tokens in `pages`."""

    q_begin: int
    q_end: int
    kv_tokens: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Host view of one step, made once and used by all layers."""

    page_tokens: int
    singles: tuple[PlannedRow, ...]  # one query
    others: tuple[PlannedRow, ...]  # more than one
    single_index: Tensor  # int64[len(singles)], query token of each


def plan_attention(page_table: Tensor, cu_q: Sequence[int], kv_lens: Sequence[int], page_tokens: int) -> AttentionPlan:
    """page_table int32[B, P]; row b owns queries [cu_q[b], cu_q[b+1]), the last ones of its kv_lens[b] tokens.

    Rows without queries are skipped. Reads the page table to the host, which is free on a CPU only.
    """
    singles: list[PlannedRow] = []
    others: list[PlannedRow] = []
    for index, pages in enumerate(page_table.tolist()):
        begin, end, tokens = cu_q[index], cu_q[index + 1], kv_lens[index]
        if begin == end:
            continue
        assert tokens >= end - begin, f"row {index}: {end - begin} queries but {tokens} tokens"
        used = -(-tokens // page_tokens)
        assert used <= len(pages), f"row {index}: {tokens} tokens do not fit in {len(pages)} pages"
        row = PlannedRow(q_begin=begin, q_end=end, kv_tokens=tokens, pages=tuple(pages[:used]))
        (singles if end - begin == 1 else others).append(row)
    return AttentionPlan(
        page_tokens=page_tokens,
        singles=tuple(singles),
        others=tuple(others),
        single_index=torch.tensor([row.q_begin for row in singles], dtype=torch.int64),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Pages of one layer, with what turns their codes into values."""

    kv: Tensor  # [pages, 2, Hkv, page_tokens, D]
    factors: Tensor | None  # float32, broadcasts against kv

    def halves(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """(pages, factors) of the keys, and of the values."""
        keys, values = self.kv.unbind(1)
        if self.factors is None:
            return (keys, None), (values, None)
        key_factors, value_factors = self.factors.unbind(1)
        return (keys, key_factors), (values, value_factors)


@dataclass(frozen=True, slots=True)
class _Extra:
    """What few calls want, of all query tokens."""

    tree: Tensor | None = None  # int64[T]
    lse: Tensor | None = None  # float[T, Hq], written

    @property
    def wanted(self) -> bool:
        return self.tree is not None or self.lse is not None


_NOTHING = _Extra()


def _source(kv: Tensor, kv_scales: Tensor | None) -> _Source:
    if kv_scales is None:
        return _Source(kv, None)
    if kv_scales.dim() == 1:
        return _Source(kv, kv_scales.view(1, 2, 1, 1, 1).expand(kv.shape[0], -1, -1, -1, -1))
    return _Source(kv, kv_scales.unsqueeze(-1))


def paged_attention(
    q: Tensor,
    kv: Tensor,
    plan: AttentionPlan,
    scores: Scores,
    *,
    kv_scales: Tensor | None = None,
    tree: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, Hq, D] over kv, one layer's view [pages, 2, Hkv, page_tokens, D], any strides.

    The KV of the queries themselves is already in the pages. Returns [T, Hq, D] in q's dtype; computes in float32, or
    in float64 if q is. kv_scales and tree: see `shape`. lse [T, Hq] receives the logarithm to base 2 of the sum of
    exp(score) over all tokens seen, and of the sink where there is one.
    """
    source = _source(kv, kv_scales)
    extra = _Extra(tree, lse) if tree is not None or lse is not None else _NOTHING
    if not plan.others:
        return _attend_singles(q, source, plan, scores, lse)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.singles:
        sums = None if lse is None else torch.empty(len(plan.singles), q.shape[1], dtype=lse.dtype, device=q.device)
        out[plan.single_index] = _attend_singles(q[plan.single_index], source, plan, scores, sums)
        if lse is not None and sums is not None:
            lse[plan.single_index] = sums
    attend = _attend_materialised if scores.changed or extra.wanted else _attend_fused
    for row in plan.others:
        attend(q[row.q_begin : row.q_end], source, row, scores, extra, out[row.q_begin : row.q_end])
    return out


class TorchAttention:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def plan(
        self,
        page_table: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        cu_q_host: Sequence[int],
        kv_lens_host: Sequence[int],
        *,
        window: int | None = None,
        upload: Upload | None = None,
        capacity: Capacity | None = None,
    ) -> AttentionPlan:
        """See `plan_attention`; what only a device needs is not looked at."""
        del cu_q, kv_lens, window, upload, capacity
        return plan_attention(page_table, cu_q_host, kv_lens_host, self._shape.page_tokens)

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        plan: AttentionPlan | Rows,
        scores: Scores,
        *,
        kv_scales: Tensor | None = None,
        tree: Tensor | None = None,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `paged_attention`. Returns `out`, or a new tensor where it is None."""
        if isinstance(plan, Rows):
            plan = plan_attention(plan.page_table, plan.cu_q_host, plan.kv_lens_host, self._shape.page_tokens)
        result = paged_attention(q, kv, plan, scores, kv_scales=kv_scales, tree=tree, lse=lse)
        return result if out is None else out.copy_(result)


def _attend_singles(q: Tensor, source: _Source, plan: AttentionPlan, scores: Scores, lse: Tensor | None) -> Tensor:
    """q [S, Hq, D], one query per row of plan.singles; lse [S, Hq]."""
    _, _, heads, page_tokens, dim = source.kv.shape
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    group = q.shape[1] // heads
    dtype = wide(q.dtype)
    scratch = torch.empty(heads, block_pages, page_tokens, dim, dtype=dtype, device=q.device)
    slots = scratch.transpose(0, 1).unbind(0)  # per page [Hkv, page_tokens, D]
    values = scratch.view(heads, block_pages * page_tokens, dim)
    keys = values.transpose(1, 2)
    queries = q.to(dtype).mul_(scores.scale) if q.dtype != dtype else q * scores.scale
    out = torch.empty(len(plan.singles), heads, group, dim, dtype=dtype, device=q.device)
    (key_pages, key_factors), (value_pages, value_factors) = source.halves()
    queries = queries.view(out.shape)
    for index, (row, query, target) in enumerate(zip(plan.singles, queries.unbind(0), out.unbind(0), strict=True)):
        first = scores.first_visible(row.kv_tokens - 1)
        blocks = _blocks(row, first, page_tokens, block_pages)
        parts = []
        for block, begin, end in blocks:
            for slot, page in zip(slots, block, strict=False):
                slot.copy_(key_pages[page])
                if key_factors is not None:
                    slot.mul_(key_factors[page])
            parts.append(torch.bmm(query, keys[:, :, begin:end]))
        raw = _capped(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), scores)
        if lse is not None:
            lse[index] = _log_sum(raw, scores).flatten()
        weights = _softmax(raw, scores)
        done = 0
        for block, begin, end in blocks:
            for slot, page in zip(slots, block, strict=False):
                slot.copy_(value_pages[page])
                if value_factors is not None:
                    slot.mul_(value_factors[page])
            share = weights[:, :, done : done + end - begin]
            if done == 0:
                torch.bmm(share, values[:, begin:end], out=target)
            else:
                target.baddbmm_(share, values[:, begin:end])
            done += end - begin
    return out.view(q.shape).to(q.dtype)


def _blocks(row: PlannedRow, first: int, page_tokens: int, block_pages: int) -> list[tuple[tuple[int, ...], int, int]]:
    """Pages of tokens [first, row.kv_tokens) by scratch block, with the range of tokens that counts inside each."""
    blocks = []
    for index in range(first // page_tokens, len(row.pages), block_pages):
        start = index * page_tokens
        stop = min(row.kv_tokens - start, block_pages * page_tokens)
        blocks.append((row.pages[index : index + block_pages], max(first - start, 0), stop))
    return blocks


def _softmax(raw: Tensor, scores: Scores) -> Tensor:
    """Weights of masked float32 scores [Hkv, G, ..., W]."""
    if scores.sinks is None:
        return raw.softmax(dim=-1)
    return _with_sinks(raw, scores.sinks).softmax(dim=-1)[..., :-1]


def _log_sum(raw: Tensor, scores: Scores) -> Tensor:
    """Masked scores [Hkv, G, ..., W] -> log2 of the sum of their exponentials [Hkv, G, ...]."""
    return torch.logsumexp(raw if scores.sinks is None else _with_sinks(raw, scores.sinks), dim=-1).mul_(LOG2_E)


def _with_sinks(raw: Tensor, sinks: Tensor) -> Tensor:
    last = sinks.to(raw.dtype).view(*raw.shape[:2], *(1 for _ in raw.shape[2:])).expand(*raw.shape[:-1], 1)
    return torch.cat((raw, last), dim=-1)


def _capped(raw: Tensor, scores: Scores) -> Tensor:
    return raw if scores.softcap is None else raw.div_(scores.softcap).tanh_().mul_(scores.softcap)


def _gather(source: _Source, row: PlannedRow, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Keys and values [Hkv, W, D] of the pages that hold tokens [first, row.kv_tokens), and the first page's token."""
    _, _, heads, page_tokens, dim = source.kv.shape
    skipped = first // page_tokens
    pages = row.pages[skipped:]
    scratch = torch.empty(2, heads, len(pages), page_tokens, dim, dtype=dtype, device=source.kv.device)
    for slot, page in zip(scratch.permute(2, 0, 1, 3, 4).unbind(0), pages, strict=True):
        slot.copy_(source.kv[page])
        if source.factors is not None:
            slot.mul_(source.factors[page])
    keys, values = scratch.view(2, heads, len(pages) * page_tokens, dim).unbind(0)
    return keys, values, skipped * page_tokens


def _hidden(queries: range, tokens: range, window: int | None) -> Tensor:
    """bool[len(queries), len(tokens)], on the host: true where a query must not look."""
    at = torch.arange(queries.start, queries.stop).unsqueeze(1)
    token = torch.arange(tokens.start, tokens.stop)
    hidden = token > at
    return hidden if window is None else hidden.logical_or_(token <= at - window)


def _hidden_in_tree(queries: range, tokens: range, window: int | None, start: int, tree: Tensor) -> Tensor:
    """The same with a tree int64[count] over the row's queries, which begin at token `start`."""
    place = torch.arange(queries.start - start, queries.stop - start).unsqueeze(1)
    own = torch.arange(tokens.start - start, tokens.stop - start)
    bits = tree.cpu()[place]
    seen = (bits >> own.clamp(0, TREE_TOKENS - 1)) & 1
    hidden = (own > place) | ((own >= 0) & (own < TREE_TOKENS) & (seen == 0))
    if window is None:
        return hidden
    node = torch.arange(TREE_TOKENS)
    ancestors = ((bits >> node) & (node <= place)).sum(-1, keepdim=True)
    depth = torch.where(place < TREE_TOKENS, ancestors - 1, place)
    return hidden | (own <= depth - window)


def _attend_fused(q: Tensor, source: _Source, row: PlannedRow, scores: Scores, _extra: _Extra, out: Tensor) -> None:
    count, query_heads, dim = q.shape
    heads = source.kv.shape[2]
    group = query_heads // heads
    start = row.kv_tokens - count
    keys, values, base = _gather(source, row, scores.first_visible(start), q.dtype)
    q = q.view(count, heads, group, dim).permute(1, 2, 0, 3)
    out = out.view(count, heads, group, dim).permute(1, 2, 0, 3)
    whole = start == 0 and (scores.window is None or scores.window >= count)
    step = count if whole else QUERY_BLOCK
    for begin in range(0, count, step):
        end = min(begin + step, count)
        first, last = scores.first_visible(start + begin), start + end
        mask = None
        if not whole:
            hidden = _hidden(range(start + begin, last), range(first, last), scores.window)
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf")).to(q.device)
        visible = slice(first - base, last - base)
        out[:, :, begin:end] = functional.scaled_dot_product_attention(
            q[:, :, begin:end],
            keys[:, None, visible].expand(-1, group, -1, -1),
            values[:, None, visible].expand(-1, group, -1, -1),
            attn_mask=mask,
            is_causal=whole,
            scale=scores.scale,
        )


def _attend_materialised(
    q: Tensor, source: _Source, row: PlannedRow, scores: Scores, extra: _Extra, out: Tensor
) -> None:
    count, query_heads, dim = q.shape
    heads = source.kv.shape[2]
    group = query_heads // heads
    start = row.kv_tokens - count
    keys, values, base = _gather(source, row, scores.first_visible(start), wide(q.dtype))
    queries = (q.to(keys.dtype) * scores.scale).view(count, heads, group, dim).permute(1, 2, 0, 3)
    out = out.view(count, heads, group, dim).permute(1, 2, 0, 3)
    tree = None if extra.tree is None else extra.tree[row.q_begin : row.q_end]
    step = max(16, min(QUERY_BLOCK, SCORE_BUDGET // (query_heads * row.kv_tokens)))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        first, last = scores.first_visible(start if tree is not None else start + begin), start + end
        visible = slice(first - base, last - base)
        block = queries[:, :, begin:end].reshape(heads, group * (end - begin), dim)
        raw = torch.bmm(block, keys[:, visible].transpose(1, 2)).view(heads, group, end - begin, last - first)
        at, tokens = range(start + begin, last), range(first, last)
        if tree is None:
            hidden = _hidden(at, tokens, scores.window)
        else:
            hidden = _hidden_in_tree(at, tokens, scores.window, start, tree)
        raw = _capped(raw, scores).masked_fill_(hidden.to(raw.device), float("-inf"))
        if extra.lse is not None:
            sums = _log_sum(raw, scores).permute(2, 0, 1).reshape(end - begin, query_heads)
            extra.lse[row.q_begin + begin : row.q_begin + end] = sums
        weights = _softmax(raw, scores)
        part = torch.bmm(weights.reshape(heads, group * (end - begin), last - first), values[:, visible])
        out[:, :, begin:end] = part.view(heads, group, end - begin, dim)
