"""Attention over paged KV: the torch reference. It is the CPU path and the oracle of every later kernel.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How scores are made. The same for all rows of one layer."""

    scale: float
    window: int | None = None  # a query sees itself and the window - 1 tokens before
    softcap: float | None = None  # cap * tanh(score / cap), Gemma 2
    sinks: Tensor | None = None  # float32[Hq]: one more score per head that takes weight and gives nothing

    @property
    def changed(self) -> bool:
        return self.softcap is not None or self.sinks is not None

    def first_visible(self, position: int) -> int:
        """First KV token that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


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


def write_kv(k: Tensor, v: Tensor, kv: Tensor, write_pages: Tensor, write_offsets: Tensor) -> None:
    """Store k, v [T, Hkv, D] of T tokens at (write_pages[t], write_offsets[t]) of one layer's view, in its dtype."""
    kv[:, 0][write_pages, :, write_offsets] = k.to(kv.dtype)
    kv[:, 1][write_pages, :, write_offsets] = v.to(kv.dtype)


def paged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Causal attention of q [T, Hq, D] over kv, one layer's view [pages, 2, Hkv, page_tokens, D], any strides.

    The KV of the queries themselves is already in the pages. Returns [T, Hq, D] in q's dtype.
    """
    if not plan.others:
        return _attend_singles(q, kv, plan, scores)
    out = torch.empty(q.shape, dtype=q.dtype)
    if plan.singles:
        out[plan.single_index] = _attend_singles(q[plan.single_index], kv, plan, scores)
    attend = _attend_materialised if scores.changed else _attend_fused
    for row in plan.others:
        attend(q[row.q_begin : row.q_end], kv, row, scores, out[row.q_begin : row.q_end])
    return out


def _attend_singles(q: Tensor, kv: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    """q [S, Hq, D], one query per row of plan.singles."""
    _, _, heads, page_tokens, dim = kv.shape
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    group = q.shape[1] // heads
    scratch = torch.empty(heads, block_pages, page_tokens, dim)
    slots = scratch.transpose(0, 1).unbind(0)  # per page [Hkv, page_tokens, D]
    values = scratch.view(heads, block_pages * page_tokens, dim)
    keys = values.transpose(1, 2)
    queries = q.float().mul_(scores.scale) if q.dtype != torch.float32 else q * scores.scale
    out = torch.empty(len(plan.singles), heads, group, dim)
    key_pages, value_pages = kv.unbind(1)
    for row, query, target in zip(plan.singles, queries.view(out.shape).unbind(0), out.unbind(0), strict=True):
        first = scores.first_visible(row.kv_tokens - 1)
        blocks = _blocks(row, first, page_tokens, block_pages)
        parts = []
        for block, begin, end in blocks:
            for slot, page in zip(slots, block, strict=False):
                slot.copy_(key_pages[page])
            parts.append(torch.bmm(query, keys[:, :, begin:end]))
        weights = _softmax(_capped(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), scores), scores)
        done = 0
        for block, begin, end in blocks:
            for slot, page in zip(slots, block, strict=False):
                slot.copy_(value_pages[page])
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
    sinks = scores.sinks.view(*raw.shape[:2], *(1 for _ in raw.shape[2:])).expand(*raw.shape[:-1], 1)
    return torch.cat((raw, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def _capped(raw: Tensor, scores: Scores) -> Tensor:
    return raw if scores.softcap is None else raw.div_(scores.softcap).tanh_().mul_(scores.softcap)


def _gather(kv: Tensor, row: PlannedRow, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Keys and values [Hkv, W, D] of the pages that hold tokens [first, row.kv_tokens), and the first page's token."""
    _, _, heads, page_tokens, dim = kv.shape
    skipped = first // page_tokens
    pages = row.pages[skipped:]
    scratch = torch.empty(2, heads, len(pages), page_tokens, dim, dtype=dtype)
    for slot, page in zip(scratch.permute(2, 0, 1, 3, 4).unbind(0), pages, strict=True):
        slot.copy_(kv[page])
    keys, values = scratch.view(2, heads, len(pages) * page_tokens, dim).unbind(0)
    return keys, values, skipped * page_tokens


def _hidden(queries: range, tokens: range, window: int | None) -> Tensor:
    """bool[len(queries), len(tokens)]: true where a query must not look."""
    at = torch.arange(queries.start, queries.stop).unsqueeze(1)
    token = torch.arange(tokens.start, tokens.stop)
    hidden = token > at
    return hidden if window is None else hidden.logical_or_(token <= at - window)


def _attend_fused(q: Tensor, kv: Tensor, row: PlannedRow, scores: Scores, out: Tensor) -> None:
    count, query_heads, dim = q.shape
    heads = kv.shape[2]
    group = query_heads // heads
    start = row.kv_tokens - count
    keys, values, base = _gather(kv, row, scores.first_visible(start), q.dtype)
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
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        visible = slice(first - base, last - base)
        out[:, :, begin:end] = functional.scaled_dot_product_attention(
            q[:, :, begin:end],
            keys[:, None, visible].expand(-1, group, -1, -1),
            values[:, None, visible].expand(-1, group, -1, -1),
            attn_mask=mask,
            is_causal=whole,
            scale=scores.scale,
        )


def _attend_materialised(q: Tensor, kv: Tensor, row: PlannedRow, scores: Scores, out: Tensor) -> None:
    count, query_heads, dim = q.shape
    heads = kv.shape[2]
    group = query_heads // heads
    start = row.kv_tokens - count
    keys, values, base = _gather(kv, row, scores.first_visible(start), torch.float32)
    queries = (q.float() * scores.scale).view(count, heads, group, dim).permute(1, 2, 0, 3)
    out = out.view(count, heads, group, dim).permute(1, 2, 0, 3)
    step = max(16, min(QUERY_BLOCK, SCORE_BUDGET // (query_heads * row.kv_tokens)))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        first, last = scores.first_visible(start + begin), start + end
        visible = slice(first - base, last - base)
        block = queries[:, :, begin:end].reshape(heads, group * (end - begin), dim)
        raw = torch.bmm(block, keys[:, visible].transpose(1, 2)).view(heads, group, end - begin, last - first)
        hidden = _hidden(range(start + begin, last), range(first, last), scores.window)
        weights = _softmax(_capped(raw, scores).masked_fill_(hidden, float("-inf")), scores)
        part = torch.bmm(weights.reshape(heads, group * (end - begin), last - first), values[:, visible])
        out[:, :, begin:end] = part.view(heads, group, end - begin, dim)
