"""Sampling state of the request table, and the grouping that lets a row pay only for what it asks.

`prepare` runs on the planning thread and turns parameters into index tensors; `sample` runs on the device, in order of
steps, and alone touches device state. A step of greedy rows is one argmax. Counts exist only for rows with penalties.
Invariant: a token depends on its row's logits, parameters, history and output position, never on the rest of the batch.
It does not know stop rules: what ends a request is decided when the step is collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag

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
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
LOGPROB_FLOOR = -9999.0  # a masked token's -inf would not survive JSON; OpenAI uses the same number
Ids = NDArray[np.int64]


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
    """Some sampled positions: `at` in [0, S), their table rows, and one more int64 each (output position or slot)."""

    at: Tensor
    rows: Tensor
    extra: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBatch:
    """One step's work, made by `prepare`. A None is a thing that nobody in this step needs."""

    reset: _Reset | None = None
    penalised: _Group | None = None
    bias: tuple[Tensor, Tensor] | None = None  # flat indices into [S, vocab], values
    masked: Tensor | None = None  # flat indices
    plain: _Group | None = None
    truncated: _Group | None = None
    width: int = math.CANDIDATES
    logprobs_at: Tensor | None = None
    top: int = 0
    tops: tuple[int, ...] | None = None  # per sampled position, -1 = no logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """On the device. Collected one step later."""

    tokens: Tensor  # int64[S]
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None  # see kernels' log_probabilities

    def logprob_records(self, tops: Sequence[int] | None) -> list[TokenLogprobs | None]:
        """One entry per sampled position, or nothing when no row asked. Blocks until the device is done."""
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

    def __init__(self, *, rows: int, vocab: int, eos_token_ids: Iterable[int], device: torch.device) -> None:
        self._vocab = vocab
        self._eos = frozenset(eos_token_ids)
        self._device = device
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
            plain=self._group(np.flatnonzero(noise == Need.NOISE), rows, positions),
            truncated=self._group(truncated, rows, positions),
            width=self._width(rows[truncated]),
            **self._logprobs(rows, needs),  # type: ignore[arg-type]
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
            reals=torch.tensor(reals, dtype=torch.float32, device=self._device),
            integers=torch.tensor(integers, dtype=torch.int64, device=self._device),
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

    def _penalised(self, rows: Ids, needs: Ids) -> _Group | None:
        at = np.flatnonzero(needs & Need.PENALTY)
        slots = np.fromiter((self._slot_of[int(row)] for row in rows[at]), np.int64, len(at))
        return _Group(at=self._ids(at), rows=self._ids(rows[at]), extra=self._ids(slots)) if len(at) else None

    def _bias(self, rows: Ids, needs: Ids) -> tuple[Tensor, Tensor] | None:
        ids: list[int] = []
        values: list[float] = []
        for at in np.flatnonzero(needs & Need.BIAS).tolist():
            bias = self._row(rows[at]).logit_bias
            ids.extend(at * self._vocab + token for token in bias)
            values.extend(bias.values())
        return (self._ids(ids), torch.tensor(values, dtype=torch.float32, device=self._device)) if ids else None

    def _masked(self, rows: Ids, needs: Ids, positions: Ids) -> Tensor | None:
        ids: list[int] = []
        for at in np.flatnonzero(needs & Need.MIN_TOKENS).tolist():
            params = self._row(rows[at])
            if positions[at] < params.min_tokens:
                stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos
                ids.extend(at * self._vocab + token for token in stops if token < self._vocab)
        return self._ids(ids) if ids else None

    def _width(self, rows: Ids) -> int:
        """Best tokens to look at: exactly top-k where every row has one, else enough for nearly every top-p."""
        limits = [self._row(row).top_k for row in rows]
        needy = any(not self._row(row).top_k and self._row(row).top_p < 1.0 for row in rows)
        return max(1, math.CANDIDATES if needy else 0, *limits) if limits else 1

    def _logprobs(self, rows: Ids, needs: Ids) -> dict[str, object]:
        at = np.flatnonzero(needs & Need.LOGPROBS)
        if not len(at):
            return {}
        tops = [-1] * len(rows)
        for index in at.tolist():
            tops[index] = self._row(rows[index]).top_logprobs
        return {"logprobs_at": self._ids(at), "top": max(tops), "tops": tuple(tops)}

    def _row(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None, f"row {row} is sampled before its admission"
        return params

    def _group(self, at: Ids, rows: Ids, extra: Ids) -> _Group | None:
        if not len(at):
            return None
        return _Group(at=self._ids(at), rows=self._ids(rows[at]), extra=self._ids(extra[at]))

    def _pairs(self, histories: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        slots = [np.full(len(tokens), slot, dtype=np.int64) for slot, tokens in histories]
        tokens = [np.asarray(tokens, dtype=np.int64) for _, tokens in histories]
        both = np.stack([np.concatenate(slots), np.concatenate(tokens)]) if slots else np.zeros((2, 0), dtype=np.int64)
        return torch.from_numpy(both).to(self._device)

    def _ids(self, values: Ids | Sequence[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._device)

    # ---- device ---------------------------------------------------------------------------------------------------
    def sample(self, logits: Tensor, batch: SampleBatch) -> Sampled:
        """Tokens of float32[S, vocab] `logits`, which are changed in place. In order of steps."""
        if batch.reset is not None:
            self._apply(batch.reset)
        if batch.penalised is not None:
            self._penalise(logits, batch.penalised)
        if batch.bias is not None:
            logits.view(-1).index_add_(0, *batch.bias)
        if batch.masked is not None:
            logits.view(-1).index_fill_(0, batch.masked, float("-inf"))
        tokens = self._choose(logits, batch)
        if batch.penalised is not None:
            made = tokens[batch.penalised.at]
            self._counts.index_put_((batch.penalised.extra, made), torch.ones_like(made, dtype=torch.int32), True)
        if batch.logprobs_at is None:
            return Sampled(tokens=tokens)
        wanted = logits[batch.logprobs_at]
        return Sampled(tokens=tokens, logprobs=math.log_probabilities(wanted, tokens[batch.logprobs_at], batch.top))

    def _choose(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        plain, truncated = batch.plain, batch.truncated
        drawn = sum(len(group.at) for group in (plain, truncated) if group is not None)
        tokens = (
            math.argmax(logits)
            if drawn < len(logits)
            else torch.empty(len(logits), dtype=torch.int64, device=self._device)
        )
        if plain is not None:
            scaled, keys = self._scaled(logits, plain)
            tokens.index_copy_(0, plain.at, math.draw(scaled, *keys))
        if truncated is not None:
            scaled, keys = self._scaled(logits, truncated)
            reals, top_k = self._reals[truncated.rows], self._integers[truncated.rows, 1]
            lowest = math.thresholds(scaled, top_k, reals[:, 1], reals[:, 2], width=batch.width)
            tokens.index_copy_(0, truncated.at, math.draw_truncated(scaled, lowest, *keys))
        return tokens

    def _scaled(self, logits: Tensor, group: _Group) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        scaled = math.scale_(logits.index_select(0, group.at), self._reals[group.rows, 0])
        return scaled, math.noise_keys(self._integers[group.rows, 0], group.extra)

    def _penalise(self, logits: Tensor, group: _Group) -> None:
        reals = self._reals[group.rows]
        changed = math.penalise_(
            logits.index_select(0, group.at), self._counts[group.extra], self._in_prompt[group.extra],
            reals[:, 3], reals[:, 4], reals[:, 5],
        )  # fmt: skip
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
