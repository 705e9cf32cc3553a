"""Runs a decoder on hand-made steps: shuffled pages, a pool full of NaN, any mix of chunks; no scheduler or sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton_engine.exec.device import Device
from baton_engine.exec.pool import KvPool
from baton_engine.models.loader import LoadedModel
from baton_engine.step import Form, StepInputs


@dataclass
class Row:
    """One sequence: its tokens, how many of them are in the pool, and where."""

    tokens: list[int]
    stored: int = 0
    pages: list[int] = field(default_factory=list)


class Driver:
    """A model, a pool, and pages handed out in random order. Pages are never handed out twice."""

    def __init__(self, model: LoadedModel, device: Device, *, pages: int = 64, page_tokens: int = 64, seed: int = 0):
        self.model = model
        self.page_tokens = page_tokens
        self.pool = KvPool(model.spec.layout(page_tokens, model.dtype), pages, device)
        self.pool.tensor.fill_(float("nan"))
        self._free = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()

    def row(self, tokens: list[int], *, reuse: Row | None = None) -> Row:
        """A new row; with `reuse` it starts on the full pages that both have in common, as a prefix hit does."""
        row = Row(tokens=list(tokens))
        if reuse is not None:
            same = 0
            for ours, theirs in zip(tokens, reuse.tokens[: reuse.stored], strict=False):
                if ours != theirs:
                    break
                same += 1
            full = min(same, len(tokens) - 1) // self.page_tokens
            row.pages, row.stored = reuse.pages[:full], full * self.page_tokens
        return row

    def inputs(self, work: list[tuple[Row, int]], sample: list[int]) -> StepInputs:
        """`work`: (row, number of next tokens to compute); `sample`: indices of work whose last logits are wanted."""
        ids, positions, pages, cu_q, lens = [], [], [], [0], []
        for row, count in work:
            begin, end = row.stored, row.stored + count
            while len(row.pages) * self.page_tokens < end:
                row.pages.append(self._free.pop())
            at = range(begin, end)
            ids += row.tokens[begin:end]
            positions += at
            pages += [row.pages[position // self.page_tokens] for position in at]
            cu_q.append(cu_q[-1] + count)
            lens.append(end)
            row.stored = end
        table = torch.full((len(work), max(len(row.pages) for row, _ in work)), self.pool.dummy_page, dtype=torch.int32)
        for index, (row, _) in enumerate(work):
            table[index, : len(row.pages)] = torch.tensor(row.pages)
        at_positions = torch.tensor(positions)
        return StepInputs(
            form=Form.DECODE if all(count == 1 for _, count in work) else Form.RAGGED,
            input_ids=torch.tensor(ids),
            positions=at_positions,
            write_pages=torch.tensor(pages),
            write_offsets=at_positions % self.page_tokens,
            cu_q=torch.tensor(cu_q, dtype=torch.int32),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
            page_table=table,
            sample_index=torch.tensor([cu_q[index + 1] - 1 for index in sample], dtype=torch.int64),
            cu_q_host=tuple(cu_q),
            kv_lens_host=tuple(lens),
        )

    def step(self, *work: tuple[Row, int]) -> None:
        """Compute; every row whose tokens are then all stored gets its greedy next token."""
        ready = [index for index, (row, count) in enumerate(work) if row.stored + count == len(row.tokens)]
        logits = self.model.decoder.forward(self.inputs(list(work), ready), self.pool)
        for index, token in zip(ready, logits.argmax(-1).tolist(), strict=True):
            work[index][0].tokens.append(token)

    def logits(self, tokens: list[int], *, chunks: tuple[int, ...] = ()) -> Tensor:
        """float32[len(tokens), vocab]: all logits of a fresh row, computed in chunks of these sizes, then the rest."""
        row = self.row(tokens)
        parts = []
        for count in (*chunks, len(tokens) - sum(chunks)):
            inputs = self.inputs([(row, count)], [0])
            every = torch.arange(count)
            parts.append(self.model.decoder.forward(_sampling(inputs, every), self.pool))
        return torch.cat(parts)


def _sampling(inputs: StepInputs, index: Tensor) -> StepInputs:
    names = [name for name in StepInputs.__dataclass_fields__ if name != "sample_index"]
    return StepInputs(sample_index=index, **{name: getattr(inputs, name) for name in names})
