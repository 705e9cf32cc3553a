"""Sampling state of the request table: what each row wants, and the histories of rows with penalties.

`prepare` runs on the planning thread and turns parameters into index tensors; `sample` runs on the device, in order of
steps, and alone touches device state. Counts exist only for rows with penalties.
Invariant: a token depends on its row's logits, parameters, history and output position, never on the rest of the batch.
It does not know how tokens are chosen (the chooser does), nor stop rules: what ends a request is decided when the step
is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton_common.errors import InvalidRequest
from baton_engine.exec.choosing import Choose, Chooser, Ids, Need, Tables, Upload, Wanted
from baton_engine.exec.fused import Fused
from baton_engine.exec.grouped import Grouped
from baton_engine.request import SamplingParams
from baton_engine.role import TokenLogprobs
from baton_engine.step import RowAdmission, RowWork
from baton_kernels.library import Library
from baton_kernels.sampler import LOGPROBS, SAMPLE, SampleShape, TritonLogprobs, TritonSample

GREEDY_BELOW = 1e-5  # temperatures that float32 cannot tell from greedy
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
LOGPROB_FLOOR = -9999.0  # a masked token's -inf would not survive JSON; OpenAI uses the same number


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
class SampleBatch:
    """One step's work, made by `prepare`."""

    choose: Choose
    reset: _Reset | None = None
    logprobs_at: tuple[Tensor, ...] = ()
    top: int = 0
    tops: tuple[int, ...] | None = None  # per sampled position, -1 = no logprobs; None = nobody asked


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
        self,
        *,
        rows: int,
        vocab: int,
        eos_token_ids: Iterable[int],
        device: torch.device,
        upload: Upload,
        library: Library,
    ) -> None:
        """`upload` carries what `prepare` makes to the device, in stream order. `library`: the device's kernels."""
        self._vocab = vocab
        self._eos = frozenset(eos_token_ids)
        self._device = device
        self._upload = upload
        self._chooser = _chooser(library, rows=rows, vocab=vocab, device=device, upload=upload)
        # Planning thread.
        self._needs = np.zeros(rows, dtype=np.int64)
        self._params: list[SamplingParams | None] = [None] * rows
        self._slot_of: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        # Device, in stream order.
        self._tables = Tables(
            reals=torch.zeros((rows, 6), dtype=torch.float32, device=device),
            integers=torch.zeros((rows, 2), dtype=torch.int64, device=device),
            counts=torch.zeros((0, vocab), dtype=torch.int32, device=device),
            in_prompt=torch.zeros((0, vocab), dtype=torch.bool, device=device),
        )

    # ---- planning thread ------------------------------------------------------------------------------------------
    def prepare(self, admissions: Sequence[RowAdmission], sampled: Sequence[RowWork]) -> SampleBatch:
        """Must be called once per step, in order of steps. `sampled`: the work items with `sample`, in their order."""
        reset = self._admit(admissions) if admissions else None
        rows = np.fromiter((work.row for work in sampled), np.int64, len(sampled))
        needs = self._needs[rows]
        if not needs.any():
            return SampleBatch(reset=reset, choose=self._chooser.greedy(len(rows)))
        wanted = self._wanted(rows, needs, [work.output_position for work in sampled])
        choose = self._chooser.plan(wanted)
        at = np.flatnonzero(needs & Need.LOGPROBS)
        if not len(at):
            return SampleBatch(reset=reset, choose=choose)
        tops = [-1] * len(rows)
        for index in at.tolist():
            tops[index] = wanted.params[index].top_logprobs
        parts = tuple(self._ids(part) for part in self._chooser.parts(at))
        return SampleBatch(reset=reset, choose=choose, logprobs_at=parts, top=max(tops), tops=tuple(tops))

    def _wanted(self, rows: Ids, needs: Ids, positions: Sequence[int]) -> Wanted:
        params = [self._row(row) for row in rows]
        slots = np.full(len(rows), -1, dtype=np.int64)
        penalised = np.flatnonzero(needs & Need.PENALTY)
        slots[penalised] = [self._slot_of[row] for row in rows[penalised].tolist()]
        return Wanted(
            rows=rows,
            needs=needs,
            positions=np.array(positions, dtype=np.int64),
            slots=slots,
            params=params,
            banned={
                at: self._stops(params[at])
                for at in np.flatnonzero(needs & Need.MIN_TOKENS).tolist()
                if positions[at] < params[at].min_tokens
            },
        )

    def _stops(self, params: SamplingParams) -> list[int]:
        stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos
        return [token for token in stops if token < self._vocab]

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

    def _row(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None, f"row {row} is sampled before its admission"
        return params

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
        tokens = batch.choose(logits, self._tables)
        parts = [self._chooser.log_probabilities(logits, at, tokens, batch.top) for at in batch.logprobs_at]
        if not parts:
            return Sampled(tokens=tokens)
        chosen, ids, values = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Sampled(tokens=tokens, logprobs=(chosen, ids, values))

    def _apply(self, reset: _Reset) -> None:
        tables = self._tables
        tables.reals.index_copy_(0, reset.rows, reset.reals)
        tables.integers.index_copy_(0, reset.rows, reset.integers)
        if not len(reset.slots):
            return
        missing = reset.capacity - len(tables.counts)
        if missing > 0:
            tables.counts = torch.cat([tables.counts, tables.counts.new_zeros((missing, self._vocab))])
            tables.in_prompt = torch.cat([tables.in_prompt, tables.in_prompt.new_zeros((missing, self._vocab))])
        tables.counts.index_fill_(0, reset.slots, 0)
        tables.in_prompt.index_fill_(0, reset.slots, False)
        tables.in_prompt[reset.prompt[0], reset.prompt[1]] = True
        ones = torch.ones(reset.output.shape[1], dtype=torch.int32, device=self._device)
        tables.counts.index_put_((reset.output[0], reset.output[1]), ones, True)


def _chooser(library: Library, *, rows: int, vocab: int, device: torch.device, upload: Upload) -> Chooser:
    """The kernels' way where the device has them, else group by group."""
    shape = SampleShape(vocab=vocab)
    sample, logprobs = library.bind(SAMPLE, shape), library.bind(LOGPROBS, shape)
    if isinstance(sample, TritonSample) and isinstance(logprobs, TritonLogprobs):
        return Fused(sample, logprobs, shape, rows=rows, device=device, upload=upload)
    return Grouped(vocab=vocab, device=device, upload=upload)


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
