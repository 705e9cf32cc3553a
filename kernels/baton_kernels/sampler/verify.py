"""Verification of drafted tokens by rejection sampling: how many are kept, and the token behind them.

For drafts that were drawn from a distribution; for others see `reference.matched`. Three launches: statistics of the
target at each draft; then every program judges the drafts anew from those, which is cheaper than to be told, and looks
at the one position whose token is drawn; then the splits are merged.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.language import jit, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer
from baton_kernels.sampler import reference
from baton_kernels.sampler.lanes import (
    MINUS_INFINITY,
    NOTHING,
    finite,
    index_of,
    mixed,
    noise_keys,
    pack,
    race,
    uniform,
)
from baton_kernels.sampler.sample import MAX_VOCAB, check_dense

MAX_DRAFTS = 15
SMALLEST_BLOCK = 2048  # logits per program
STREAM = 0x2545F4914F6CDD1D  # into the seed: drafts may be drawn with the noise of the request itself


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyShape:
    """Up to `drafts` tokens per row."""

    vocab: int
    drafts: int

    @property
    def label(self) -> str:
        return f"v{self.vocab}-k{self.drafts}"

    def workspace(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scratch of calls for at most so many rows: statistics, winners. See `SampleShape.workspace`."""
        splits = -(-self.vocab // SMALLEST_BLOCK)
        return (
            torch.empty((rows, (self.drafts + 1) * splits * 2), dtype=torch.float32, device=device),
            torch.empty((rows, splits), dtype=torch.int64, device=device),
        )


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchVerify:
    """The specification."""

    programs: Sequence[Program] = ()

    def __call__(
        self,
        draft: Tensor,
        lengths: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        *,
        accepted: Tensor,
        tokens: Tensor,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """See `reference.verify`. seeds: int64[R] of requests; positions: int64[R] in the output, of the first draft.

        Writes accepted int64[R] and tokens int64[R, drafts + 1]. workspace: scratch, see `VerifyShape.workspace`.
        """
        place = torch.arange(draft.shape[1] + 1, device=draft.device)
        keys = reference.noise_keys((seeds ^ STREAM)[:, None], positions[:, None] + place)
        found = reference.verify(draft, lengths, logits, probabilities, temperature, *keys)
        accepted.copy_(found[0])
        tokens.copy_(found[1])


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def weigh_targets(
    LENGTHS, LOGITS, TEMPERATURE, STATISTICS,
    VOCAB: tl.constexpr, DRAFTS: tl.constexpr, SPLITS: tl.constexpr, STATISTICS_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, place and BLOCK logits: their maximum and, over the temperature, sum of exponentials."""
    row, place, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if place <= tl.load(LENGTHS + row):
        coldness = 1.0 / tl.maximum(tl.load(TEMPERATURE + row), 1e-9)
        at = split * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + (row * (DRAFTS + 1) + place) * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
        top = tl.max(x, 0)
        to = STATISTICS + row * STATISTICS_ROW + (place * SPLITS + split) * 2
        tl.store(to, top)
        tl.store(to + 1, tl.sum(tl.exp((x - finite(top)) * coldness), 0))


@jit
def weights(STATISTICS, place, coldness, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr):
    """Maximum and sum of exponentials of one place, over all splits."""
    split = tl.arange(0, SPLIT_BLOCK)
    tops = tl.load(STATISTICS + (place * SPLITS + split) * 2, mask=split < SPLITS, other=float("-inf"))
    sums = tl.load(STATISTICS + (place * SPLITS + split) * 2 + 1, mask=split < SPLITS, other=0.0)
    top = finite(tl.max(tops, 0))
    return top, tl.sum(sums * tl.exp((tops - top) * coldness), 0)


@jit
def judged(
    DRAFT, LOGITS, PROBABILITIES, STATISTICS, length, temperature, seed, position,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """How many drafts of a row are accepted. All pointers are at the row."""
    coldness = 1.0 / tl.maximum(temperature, 1e-9)
    accepted = tl.full((), 0, tl.int32)
    looking = length > 0
    while looking:
        token = tl.load(DRAFT + accepted)
        top, total = weights(STATISTICS, accepted, coldness, SPLITS, SPLIT_BLOCK)
        x = tl.load(LOGITS + accepted.to(tl.int64) * VOCAB + token)
        q = tl.load(PROBABILITIES + accepted.to(tl.int64) * VOCAB + token)
        k0, k1 = noise_keys(seed, position + accepted)
        coin = uniform(mixed(k0 - 0x9E3779B9) ^ k1)
        right = coin * q * total < tl.exp((x - top) * coldness)
        accepted += right.to(tl.int32)
        looking = right & (accepted < length)
    return accepted


@jit
def draw_behind(
    DRAFT, LENGTHS, LOGITS, PROBABILITIES, TEMPERATURE, SEEDS, POSITIONS, STATISTICS, WINNERS, stream,
    VOCAB: tl.constexpr, DRAFTS: tl.constexpr, SPLITS: tl.constexpr, STATISTICS_ROW: tl.constexpr,
    WINNERS_ROW: tl.constexpr, SPLIT_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and BLOCK logits of the place behind the accepted drafts: its best pair."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    LOGITS += row * (DRAFTS + 1) * VOCAB
    PROBABILITIES += row * DRAFTS * VOCAB
    STATISTICS += row * STATISTICS_ROW
    length, temperature = tl.load(LENGTHS + row), tl.load(TEMPERATURE + row)
    seed, position = tl.load(SEEDS + row) ^ stream, tl.load(POSITIONS + row)
    place = judged(
        DRAFT + row * DRAFTS, LOGITS, PROBABILITIES, STATISTICS, length, temperature, seed, position,
        VOCAB, SPLITS, SPLIT_BLOCK,
    )  # fmt: skip
    coldness = 1.0 / tl.maximum(temperature, 1e-9)
    top, total = weights(STATISTICS, place, coldness, SPLITS, SPLIT_BLOCK)
    at = split * BLOCK + tl.arange(0, BLOCK)
    inside = at < VOCAB
    x = tl.load(LOGITS + place.to(tl.int64) * VOCAB + at, mask=inside, other=float("-inf"))
    if temperature > 0.0:
        drafted = inside & (place < length)
        q = tl.load(PROBABILITIES + place.to(tl.int64) * VOCAB + at, mask=drafted, other=0.0)
        more = tl.exp((x - top) * coldness) / total - q
        k0, k1 = noise_keys(seed, position + place)
        x = tl.where(more > 0.0, tl.log(tl.maximum(more, 1e-37)) - race(at, k0, k1), float("-inf"))
    tl.store(WINNERS + row * WINNERS_ROW + split, tl.max(tl.where(inside, pack(x, at), NOTHING), 0))


@jit
def write_verified(
    DRAFT, LENGTHS, LOGITS, PROBABILITIES, TEMPERATURE, SEEDS, POSITIONS, STATISTICS, WINNERS, ACCEPTED, TOKENS, stream,
    VOCAB: tl.constexpr, DRAFTS: tl.constexpr, SPLITS: tl.constexpr, STATISTICS_ROW: tl.constexpr,
    WINNERS_ROW: tl.constexpr, SPLIT_BLOCK: tl.constexpr, PLACE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTHS + row)
    accepted = judged(
        DRAFT + row * DRAFTS, LOGITS + row * (DRAFTS + 1) * VOCAB, PROBABILITIES + row * DRAFTS * VOCAB,
        STATISTICS + row * STATISTICS_ROW, length, tl.load(TEMPERATURE + row), tl.load(SEEDS + row) ^ stream,
        tl.load(POSITIONS + row), VOCAB, SPLITS, SPLIT_BLOCK,
    )  # fmt: skip
    tl.store(ACCEPTED + row, accepted.to(tl.int64))
    split, place = tl.arange(0, SPLIT_BLOCK), tl.arange(0, PLACE_BLOCK)
    best = tl.max(tl.load(WINNERS + row * WINNERS_ROW + split, mask=split < SPLITS, other=NOTHING), 0)
    draft = tl.load(DRAFT + row * DRAFTS + place, mask=place < DRAFTS, other=-1)
    # Where the target has nothing more than the drafter, they are the same but for rounding.
    nothing = ((best >> 32) <= MINUS_INFINITY) & (accepted < length)
    token = tl.where((place == accepted) & (nothing == 0), index_of(best).to(tl.int64), draft)
    tl.store(TOKENS + row * (DRAFTS + 1) + place, tl.where(place <= accepted, token, -1), mask=place <= DRAFTS)


class TritonVerify:
    """See `TorchVerify.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: VerifyShape, config: Config) -> None:
        block = config["BLOCK"]
        assert block >= SMALLEST_BLOCK, "the workspace has no room for smaller ones"
        self._shape = shape
        self._splits = -(-shape.vocab // block)
        splits = -(-shape.vocab // SMALLEST_BLOCK)
        self._statistics, self._winners = (shape.drafts + 1) * splits * 2, splits
        reals, integers = pointer(torch.float32), pointer(torch.int64)
        weighed = {"LENGTHS": integers, "LOGITS": reals, "TEMPERATURE": reals, "STATISTICS": reals}
        row = {"DRAFT": integers, "LENGTHS": integers, "LOGITS": reals, "PROBABILITIES": reals, "TEMPERATURE": reals}
        row |= {"SEEDS": integers, "POSITIONS": integers, "STATISTICS": reals, "WINNERS": integers}
        sizes = {"VOCAB": shape.vocab, "DRAFTS": shape.drafts, "SPLITS": self._splits}
        sizes |= {"STATISTICS_ROW": self._statistics}
        merged = sizes | {"WINNERS_ROW": splits, "SPLIT_BLOCK": 1 << (self._splits - 1).bit_length()}
        make = partial(Program, capabilities=capabilities)
        options = {"num_warps": config["num_warps"], "num_stages": 1}
        self._weigh = make(weigh_targets, types=weighed, constants=sizes | {"BLOCK": block}, config=options)
        self._draw = make(
            draw_behind, types=row | {"stream": "i64"}, constants=merged | {"BLOCK": block}, config=options
        )  # fmt: skip
        self._write = make(
            write_verified,
            types=row | {"ACCEPTED": integers, "TOKENS": integers, "stream": "i64"},
            constants=merged | {"PLACE_BLOCK": 1 << shape.drafts.bit_length()},
            config={"num_warps": 1, "num_stages": 1},
        )
        self.programs = (self._weigh, self._draw, self._write)

    def __call__(
        self,
        draft: Tensor,
        lengths: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        *,
        accepted: Tensor,
        tokens: Tensor,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        rows, vocab, drafts = draft.shape[0], self._shape.vocab, self._shape.drafts
        statistics, winners = self._shape.workspace(rows, draft.device) if workspace is None else workspace
        for tensor, name, size in (
            (draft, "draft", (rows, drafts)),
            (lengths, "lengths", (rows,)),
            (logits, "logits", (rows, drafts + 1, vocab)),
            (probabilities, "probabilities", (rows, drafts, vocab)),
            (temperature, "temperature", (rows,)),
            (seeds, "seeds", (rows,)),
            (positions, "positions", (rows,)),
            (accepted, "accepted", (rows,)),
            (tokens, "tokens", (rows, drafts + 1)),
            (statistics, "workspace", (None, self._statistics)),
            (winners, "workspace", (statistics.shape[0], self._winners)),
        ):
            check_dense(tensor, name, size)
        if statistics.shape[0] < rows:
            raise InputError(f"workspace is for {statistics.shape[0]} rows, draft has {rows}")
        own = draft, lengths, logits, probabilities, temperature, seeds, positions, statistics, winners
        self._weigh((rows, drafts + 1, self._splits), lengths, logits, temperature, statistics)
        self._draw((rows, self._splits, 1), *own, STREAM)
        self._write((rows, 1, 1), *own, accepted, tokens, STREAM)


def _refuses(capabilities: Capabilities, shape: VerifyShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.vocab > MAX_VOCAB:
        return f"a vocabulary of {shape.vocab} is more than {MAX_VOCAB}"
    if not 1 <= shape.drafts <= MAX_DRAFTS:
        return f"{shape.drafts} drafts per row; 1 to {MAX_DRAFTS} can be verified"
    return ""


def _configs(_capabilities: Capabilities, _shape: VerifyShape) -> Sequence[Config]:
    return [{"BLOCK": block, "num_warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8)]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: VerifyShape, rows: int) -> Traffic:
    """Reads the target's logits at every place once, and both distributions at one more."""
    logits = rows * shape.vocab * (shape.drafts + 3)
    return Traffic(bytes=logits * 4, flops=4 * logits)


def _call(shape: VerifyShape, rows: int, random: torch.Generator, device: torch.device) -> Call:
    vocab, drafts = shape.vocab, shape.drafts
    integer = partial(torch.randint, generator=random)
    logits = torch.randn(rows, drafts + 1, vocab, generator=random) * 3
    q = (logits[:, :-1] + torch.randn(rows, drafts, vocab, generator=random) / 2).softmax(2)
    draft = q.flatten(0, 1).multinomial(1, generator=random).view(rows, drafts) if rows else torch.zeros(0, drafts)
    arguments = {
        "draft": draft.long(),
        "lengths": integer(0, drafts + 1, (rows,)),
        "logits": logits,
        "probabilities": q,
        "temperature": torch.tensor([0.0, 1.0, 0.8]).repeat(rows)[:rows],
        "seeds": integer(-(2**62), 2**62, (rows,)),
        "positions": integer(0, 1000, (rows,)),
        "accepted": torch.empty(rows, dtype=torch.int64),
        "tokens": torch.empty(rows, drafts + 1, dtype=torch.int64),
    }
    placed = {name: value.to(device) for name, value in arguments.items()}
    return Call(
        arguments={**placed, "workspace": shape.workspace(rows, device)},
        outputs=("accepted", "tokens"),
        exact=("accepted", "tokens"),
    )


def cases() -> Sequence[Case[VerifyShape]]:
    """One split and several; few and many drafts, of which rows have different numbers; nobody."""
    found = [_case(vocab, drafts, rows) for vocab, drafts, rows in ((40, 3, 6), (5000, 1, 3), (20, 7, 4), (20, 2, 0))]
    return [*found, _case(128256, 4, 64, bench=True)]


def _case(vocab: int, drafts: int, rows: int, *, bench: bool = False) -> Case[VerifyShape]:
    shape = VerifyShape(vocab=vocab, drafts=drafts)
    return Case(
        name=f"{shape.label}-r{rows}",
        shape=shape,
        make=partial(_call, shape, rows),
        traffic=model(shape, rows),
        bench=bench,
    )


FAMILY: Family[VerifyShape, TorchVerify | TritonVerify] = Family(
    op="verify",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonVerify, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, _shape, _config: TorchVerify()),
    ),
    shapes=lambda _capabilities: [VerifyShape(vocab=vocab, drafts=4) for vocab in (128256, 151936)],
    cases=cases,
    expects={"weigh_targets": ("wide load",), "draw_behind": ("wide load",)},
)
