"""Choosing tokens group by group: each position goes through the passes that it needs and no other.

So few positions are worked on at a time that their logits stay in a CPU's cache: with a dozen passes over a large
vocabulary that is half of the time. It is the only way where a device has no kernels for it; on a GPU, rows for which
truncation looked at too little then make the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton_engine.exec.choosing import Choose, Ids, Need, Tables, Upload, Wanted
from baton_kernels import sampler as math

CACHED_LOGITS = 1 << 18  # that a CPU works on at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Some positions: `at` in [0, S), their table rows, and one more int64 each (output position or slot)."""

    at: Tensor
    rows: Tensor
    extra: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """One step. A None is a thing that nobody needs."""

    penalised: tuple[_Group, ...]
    bias: tuple[Tensor, Tensor] | None  # flat indices into [S, vocab], values
    banned: Tensor | None  # flat indices
    plain: tuple[_Group, ...]
    truncated: tuple[_Group, ...]
    drawn: int  # positions in `plain` and `truncated`
    width: int  # see kernels' truncate
    whole_mass: bool

    def choose(self, logits: Tensor, tables: Tables) -> Tensor:
        for group in self.penalised:
            _penalise(logits, group, tables)
        if self.bias is not None:
            logits.view(-1).index_add_(0, *self.bias)
        if self.banned is not None:
            logits.view(-1).index_fill_(0, self.banned, float("-inf"))
        if self.drawn < len(logits):
            tokens = math.argmax(logits)
        else:
            tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        self._draw(logits, tables, tokens)
        for group in self.penalised:
            made = tokens[group.at]
            tables.counts.index_put_((group.extra, made), torch.ones_like(made, dtype=torch.int32), True)
        return tokens

    def _draw(self, logits: Tensor, tables: Tables, tokens: Tensor) -> None:
        for group in self.plain:
            keys = math.noise_keys(tables.integers[group.rows, 0], group.extra)
            drawn = math.draw(logits[group.at], tables.reals[group.rows, 0], *keys)
            tokens.index_copy_(0, group.at, drawn)
        for group in self.truncated:
            integers = tables.integers[group.rows]
            temperature, top_p, min_p = tables.reals[group.rows, :3].unbind(1)
            keys = math.noise_keys(integers[:, 0], group.extra)
            drawn = math.draw_truncated(
                logits[group.at],
                temperature,
                integers[:, 1],
                top_p,
                min_p,
                *keys,
                width=self.width,
                whole_mass=self.whole_mass,
            )
            tokens.index_copy_(0, group.at, drawn)


class Grouped:
    """A CPU's chooser."""

    def __init__(self, *, vocab: int, device: torch.device, upload: Upload) -> None:
        self._vocab = vocab
        self._upload = upload
        self._part = max(1, CACHED_LOGITS // vocab) if device.type == "cpu" else None

    def greedy(self, _positions: int) -> Choose:
        return lambda logits, _tables: math.argmax(logits)

    def plan(self, wanted: Wanted) -> Choose:
        noise = wanted.needs & (Need.NOISE | Need.TRUNCATE)
        plain, truncated = (np.flatnonzero(noise == kind) for kind in (Need.NOISE, Need.NOISE | Need.TRUNCATE))
        cut = [wanted.params[at] for at in truncated.tolist()]
        return _Groups(
            penalised=self._groups(np.flatnonzero(wanted.slots >= 0), wanted.rows, wanted.slots),
            bias=self._bias(wanted),
            banned=self._banned(wanted),
            plain=self._groups(plain, wanted.rows, wanted.positions),
            truncated=self._groups(truncated, wanted.rows, wanted.positions),
            drawn=len(plain) + len(truncated),
            # One more than top-k where every row has one, else enough for nearly every row.
            width=max((one.top_k + 1 if one.top_k else math.CANDIDATES for one in cut), default=1),
            whole_mass=any(one.top_p < 1.0 and not one.top_k for one in cut),
        ).choose

    def parts(self, at: Ids) -> list[Ids]:
        size = self._part or max(1, len(at))
        return [at[begin : begin + size] for begin in range(0, len(at), size)]

    def log_probabilities(self, logits: Tensor, at: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        return math.log_probabilities(logits[at], tokens[at], top)

    def _bias(self, wanted: Wanted) -> tuple[Tensor, Tensor] | None:
        ids: list[int] = []
        values: list[float] = []
        for at in np.flatnonzero(wanted.needs & Need.BIAS).tolist():
            bias = wanted.params[at].logit_bias
            ids.extend(at * self._vocab + token for token in bias)
            values.extend(bias.values())
        return (self._ids(ids), self._upload(np.array(values, dtype=np.float32))) if ids else None

    def _banned(self, wanted: Wanted) -> Tensor | None:
        ids = [at * self._vocab + token for at, tokens in wanted.banned.items() for token in tokens]
        return self._ids(ids) if ids else None

    def _groups(self, at: Ids, rows: Ids, extra: Ids) -> tuple[_Group, ...]:
        return tuple(
            _Group(at=self._ids(part), rows=self._ids(rows[part]), extra=self._ids(extra[part]))
            for part in self.parts(at)
        )

    def _ids(self, values: Ids | list[int]) -> Tensor:
        return self._upload(np.asarray(values, dtype=np.int64))


def _penalise(logits: Tensor, group: _Group, tables: Tables) -> None:
    repetition, presence, frequency = tables.reals[group.rows, 3:].unbind(1)
    histories = tables.counts[group.extra], tables.in_prompt[group.extra]
    changed = math.penalise_(logits[group.at], *histories, repetition, presence, frequency)
    logits.index_copy_(0, group.at, changed)
