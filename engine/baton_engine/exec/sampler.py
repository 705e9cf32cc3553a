"""Sampling state of the request table, and the grouping that lets a row pay only for what it asks.

`prepare` runs on the planning thread and turns parameters into index tensors; `sample` runs on the device, in order of
steps, and alone touches device state. A step of greedy rows is one argmax. Counts exist only for rows with penalties.
Invariant: a token depends on its row's logits, parameters, history and output position, never on the rest of the batch.
It does not know stop rules: what ends a request is decided when the step is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_common.errors import InvalidRequest
from baton_engine.request import SamplingParams
from baton_engine.role import TokenLogprobs
from baton_engine.step import RowAdmission, RowWork
from baton_kernels import sampler as math

GREEDY_BELOW = 1e-5  # temperatures that float32 cannot tell from greedy
CACHED_LOGITS = 1 << 18  # that a CPU works on at a time
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
LOGPROB_FLOOR = -9999.0  # a masked token's -inf would not survive JSON; OpenAI uses the same number
Ids = NDArray[np.int64]
Upload = Callable[[NDArray[Any]], Tensor]


class Need(IntFlag):
    """What a row wants beyond argmax."""

    NOISE = 1
    TRUNCATE = 2
    PENALTY = 4
    BIAS = 8
    MIN_TOKENS = 16
    LOGPROBS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reset:
    """New contents of rows; pairs (slot, token) fill the histories of rows with penalties."""

    rows: Tensor  # int64[A]
    reals: Tensor  # float32[A, 6]
    integers: Tensor  # int64[A, 2]
    slots: Tensor  # int64[A']
    prompt: Tensor  # int64[2, N]
    output: Tensor  # int64[2, M]
    capacity: int  # slots that must exist


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Some sampled positions: `at` in [0, S), their table rows, and one more int64 each (output position or slot).

    So few that a pass over their logits stays in a CPU's cache: with a dozen passes that is half of the time.
    """

    at: Tensor
    rows: Tensor
    extra: Tensor


class _Cut(TypedDict):
    width: int
    whole_mass: bool


class _Logprobs(TypedDict):
    logprobs_at: tuple[Tensor, ...]
    top: int
    tops: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBatch:
    """One step's work, made by `prepare`. A None is a thing that nobody in this step needs."""

    reset: _Reset | None = None
    penalised: tuple[_Group, ...] = ()
    bias: tuple[Tensor, Tensor] | None = None  # flat indices into [S, vocab], values
    masked: Tensor | None = None  # flat indices
    plain: tuple[_Group, ...] = ()
    truncated: tuple[_Group, ...] = ()
    drawn: int = 0  # positions in `plain` and `truncated`
    width: int = math.CANDIDATES  # see kernels' truncate
    whole_mass: bool = False
    logprobs_at: tuple[Tensor, ...] = ()
    top: int = 0
    tops: tuple[int, ...] | None = None  # per sampled position, -1 = no logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Collected one step later, from the host."""

    tokens: Tensor  # int64[S]
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None  # see kernels' log_probabilities

    def to_host(self, download: Callable[[Tensor], Tensor]) -> Sampled:
        """The same on the host, once the launch that asks has ended."""
        if self.logprobs is None:
            return Sampled(tokens=download(self.tokens))
        chosen, ids, values = self.logprobs
        return Sampled(tokens=download(self.tokens), logprobs=(download(chosen), download(ids), download(values)))

    def logprob_records(self, tops: Sequence[int] | None) -> list[TokenLogprobs | None]:
        """One entry per sampled position, or nothing when no row asked."""
        if self.logprobs is None or tops is None:
            return []
        chosen, ids, values = (part.tolist() for part in self.logprobs)
        records: list[TokenLogprobs | None] = []
        row = 0
        for top in tops:
            if top < 0:
                records.append(None)
                continue
            best = tuple((i, max(v, LOGPROB_FLOOR)) for i, v in zip(ids[row][:top], values[row][:top], strict=True))
            records.append(TokenLogprobs(logprob=max(chosen[row], LOGPROB_FLOOR), top=best))
            row += 1
        return records


class RowSampler:
    """Owner of the sampling state of all rows."""

    def __init__(
        self, *, rows: int, vocab: int, eos_token_ids: Iterable[int], device: torch.device, upload: Upload
    ) -> None:
        """`upload` carries what `prepare` makes to the device, in stream order."""
        self._vocab = vocab
        self._eos = frozenset(eos_token_ids)
        self._device = device
        self._upload = upload
        # Planning thread.
        self._needs = np.zeros(rows, dtype=np.int64)
        self._params: list[SamplingParams | None] = [None] * rows
        self._slot_of: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        # Device, in stream order. Columns: temperature, top_p, min_p, repetition, presence, frequency | seed, top_k.
        self._reals = torch.zeros((rows, 6), dtype=torch.float32, device=device)
        self._integers = torch.zeros((rows, 2), dtype=torch.int64, device=device)
        self._counts = torch.zeros((0, vocab), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab), dtype=torch.bool, device=device)

    # ---- planning thread ------------------------------------------------------------------------------------------
    def prepare(self, admissions: Sequence[RowAdmission], sampled: Sequence[RowWork]) -> SampleBatch:
        """Must be called once per step, in order of steps. `sampled`: the work items with `sample`, in their order."""
        reset = self._admit(admissions) if admissions else None
        rows = np.fromiter((work.row for work in sampled), np.int64, len(sampled))
        needs = self._needs[rows]
        if not needs.any():
            return SampleBatch(reset=reset)
        positions = np.fromiter((work.output_position for work in sampled), np.int64, len(sampled))
        noise = needs & (Need.NOISE | Need.TRUNCATE)
        truncated = np.flatnonzero(noise == Need.NOISE | Need.TRUNCATE)
        return SampleBatch(
            reset=reset,
            penalised=self._penalised(rows, needs),
            bias=self._bias(rows, needs),
            masked=self._masked(rows, needs, positions),
            plain=self._groups(np.flatnonzero(noise == Need.NOISE), rows, positions),
            truncated=self._groups(truncated, rows, positions),
            drawn=int(np.count_nonzero(noise)),
            **self._cut(rows[truncated]),
            **self._logprobs(rows, needs),
        )

    def _admit(self, admissions: Sequence[RowAdmission]) -> _Reset | None:
        stateful: list[RowAdmission] = []
        fresh: list[tuple[int, RowAdmission]] = []
        for admission in admissions:
            row, params = admission.row, admission.sampling
            needs = _needs(params)
            self._needs[row] = needs
            self._params[row] = params
            slot = self._slot_of.pop(row, None)
            if slot is not None:
                self._free_slots.append(slot)
            if needs & Need.PENALTY:
                fresh.append((self._take_slot(row), admission))
            if needs & (Need.NOISE | Need.PENALTY):
                stateful.append(admission)
        if not stateful:
            return None
        reals = [
            (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in (admission.sampling for admission in stateful)
        ]
        integers = [(_signed(admission.sampling.seed), admission.sampling.top_k) for admission in stateful]
        return _Reset(
            rows=self._ids([admission.row for admission in stateful]),
            reals=self._upload(np.array(reals, dtype=np.float32)),
            integers=self._upload(np.array(integers, dtype=np.int64)),
            slots=self._ids([slot for slot, _ in fresh]),
            prompt=self._pairs([(slot, one.tokens[: one.prompt_tokens]) for slot, one in fresh]),
            output=self._pairs([(slot, one.tokens[one.prompt_tokens :]) for slot, one in fresh]),
            capacity=self._slots,
        )

    def _take_slot(self, row: int) -> int:
        if not self._free_slots:
            grown = min(max(4, 2 * self._slots), len(self._params))
            self._free_slots.extend(range(grown - 1, self._slots - 1, -1))
            self._slots = grown
        slot = self._free_slots.pop()
        self._slot_of[row] = slot
        return slot

    def _penalised(self, rows: Ids, needs: Ids) -> tuple[_Group, ...]:
        at = np.flatnonzero(needs & Need.PENALTY)
        slots = np.zeros(len(rows), dtype=np.int64)
        slots[at] = [self._slot_of[row] for row in rows[at].tolist()]
        return self._groups(at, rows, slots)

    def _bias(self, rows: Ids, needs: Ids) -> tuple[Tensor, Tensor] | None:
        ids: list[int] = []
        values: list[float] = []
        for at in np.flatnonzero(needs & Need.BIAS).tolist():
            bias = self._row(rows[at]).logit_bias
            ids.extend(at * self._vocab + token for token in bias)
            values.extend(bias.values())
        return (self._ids(ids), self._upload(np.array(values, dtype=np.float32))) if ids else None

    def _masked(self, rows: Ids, needs: Ids, positions: Ids) -> Tensor | None:
        ids: list[int] = []
        for at in np.flatnonzero(needs & Need.MIN_TOKENS).tolist():
            params = self._row(rows[at])
            if positions[at] < params.min_tokens:
                stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos
                ids.extend(at * self._vocab + token for token in stops if token < self._vocab)
        return self._ids(ids) if ids else None

    def _cut(self, rows: Ids) -> _Cut:
        """Best tokens to look at: one more than top-k where every row has one, else enough for nearly every row."""
        params = [self._row(row) for row in rows]
        return {
            "width": max((one.top_k + 1 if one.top_k else math.CANDIDATES for one in params), default=1),
            "whole_mass": any(one.top_p < 1.0 and not one.top_k for one in params),
        }

    def _logprobs(self, rows: Ids, needs: Ids) -> _Logprobs:
        at = np.flatnonzero(needs & Need.LOGPROBS)
        if not len(at):
            return {"logprobs_at": (), "top": 0, "tops": None}
        tops = [-1] * len(rows)
        for index in at.tolist():
            tops[index] = self._row(rows[index]).top_logprobs
        return {"logprobs_at": tuple(map(self._ids, self._parts(at))), "top": max(tops), "tops": tuple(tops)}

    def _row(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None, f"row {row} is sampled before its admission"
        return params

    def _groups(self, at: Ids, rows: Ids, extra: Ids) -> tuple[_Group, ...]:
        return tuple(
            _Group(at=self._ids(part), rows=self._ids(rows[part]), extra=self._ids(extra[part]))
            for part in self._parts(at)
        )

    def _parts(self, at: Ids) -> list[Ids]:
        size = max(1, CACHED_LOGITS // self._vocab) if self._device.type == "cpu" else max(1, len(at))
        return [at[begin : begin + size] for begin in range(0, len(at), size)]

    def _pairs(self, histories: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        slots = [np.full(len(tokens), slot, dtype=np.int64) for slot, tokens in histories]
        tokens = [np.asarray(tokens, dtype=np.int64) for _, tokens in histories]
        both = np.stack([np.concatenate(slots), np.concatenate(tokens)]) if slots else np.zeros((2, 0), dtype=np.int64)
        return self._upload(both)

    def _ids(self, values: Ids | Sequence[int]) -> Tensor:
        return self._upload(np.asarray(values, dtype=np.int64))

    # ---- device ---------------------------------------------------------------------------------------------------
    def sample(self, logits: Tensor, batch: SampleBatch) -> Sampled:
        """Tokens of float32[S, vocab] `logits`, which are changed in place. In order of steps."""
        if batch.reset is not None:
            self._apply(batch.reset)
        for group in batch.penalised:
            self._penalise(logits, group)
        if batch.bias is not None:
            logits.view(-1).index_add_(0, *batch.bias)
        if batch.masked is not None:
            logits.view(-1).index_fill_(0, batch.masked, float("-inf"))
        tokens = self._choose(logits, batch)
        for group in batch.penalised:
            made = tokens[group.at]
            self._counts.index_put_((group.extra, made), torch.ones_like(made, dtype=torch.int32), True)
        parts = [math.log_probabilities(logits[at], tokens[at], batch.top) for at in batch.logprobs_at]
        if not parts:
            return Sampled(tokens=tokens)
        chosen, ids, values = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Sampled(tokens=tokens, logprobs=(chosen, ids, values))

    def _choose(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        if batch.drawn < len(logits):
            tokens = math.argmax(logits)
        else:
            tokens = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        for group in batch.plain:
            keys = math.noise_keys(self._integers[group.rows, 0], group.extra)
            drawn = math.draw(logits[group.at], self._reals[group.rows, 0], *keys)
            tokens.index_copy_(0, group.at, drawn)
        for group in batch.truncated:
            integers = self._integers[group.rows]
            temperature, top_p, min_p = self._reals[group.rows, :3].unbind(1)
            keys = math.noise_keys(integers[:, 0], group.extra)
            drawn = math.draw_truncated(
                logits[group.at],
                temperature,
                integers[:, 1],
                top_p,
                min_p,
                *keys,
                width=batch.width,
                whole_mass=batch.whole_mass,
            )
            tokens.index_copy_(0, group.at, drawn)
        return tokens

    def _penalise(self, logits: Tensor, group: _Group) -> None:
        repetition, presence, frequency = self._reals[group.rows, 3:].unbind(1)
        changed = math.penalise_(
            logits[group.at], self._counts[group.extra], self._in_prompt[group.extra], repetition, presence, frequency
        )
        logits.index_copy_(0, group.at, changed)

    def _apply(self, reset: _Reset) -> None:
        self._reals.index_copy_(0, reset.rows, reset.reals)
        self._integers.index_copy_(0, reset.rows, reset.integers)
        if not len(reset.slots):
            return
        missing = reset.capacity - len(self._counts)
        if missing > 0:
            self._counts = torch.cat([self._counts, self._counts.new_zeros((missing, self._vocab))])
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros((missing, self._vocab))])
        self._counts.index_fill_(0, reset.slots, 0)
        self._in_prompt.index_fill_(0, reset.slots, False)
        self._in_prompt[reset.prompt[0], reset.prompt[1]] = True
        ones = torch.ones(reset.output.shape[1], dtype=torch.int32, device=self._device)
        self._counts.index_put_((reset.output[0], reset.output[1]), ones, True)


def _needs(params: SamplingParams) -> Need:
    needs = Need(0)
    if params.temperature >= GREEDY_BELOW:
        needs |= Need.NOISE
        if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
            needs |= Need.TRUNCATE
    if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        needs |= Need.PENALTY
    if params.logit_bias:
        needs |= Need.BIAS
    if params.min_tokens:
        needs |= Need.MIN_TOKENS
    if params.logprobs:
        needs |= Need.LOGPROBS
    return needs


def _signed(seed: int) -> int:
    """The 64 bits of a seed as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def validate(params: SamplingParams, vocab: int) -> None:
    """Raise InvalidRequest, with `param`, for what no sampler can do; the edge has checked, its defects end here."""
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("temperature", params.temperature, 0.0, 100.0),
        ("top_k", params.top_k, 0, 2**31 - 1),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("repetition_penalty", params.repetition_penalty, 0.01, 100.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        ("max_tokens", params.max_tokens, 1, 2**31 - 1),
        ("min_tokens", params.min_tokens, 0, params.max_tokens),
        ("seed", params.seed, -(2**63), 2**64 - 1),
        ("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS if params.logprobs else 0),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:  # false for NaN too
            raise InvalidRequest(f"{name} is {value}; it must be between {low} and {high}", param=name)
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        strange = next((token for token in ids if not 0 <= token < vocab), None)
        if strange is not None:
            raise InvalidRequest(f"{name} names token {strange}; the vocabulary has {vocab}", param=name)
    for token, value in params.logit_bias.items():
        if not -100.0 <= value <= 100.0:
            raise InvalidRequest(f"logit_bias of token {token} is {value}; use -100 to 100", param="logit_bias")
