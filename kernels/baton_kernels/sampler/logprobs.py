"""Log-probabilities of the chosen token and of the best ones, of some positions of a step.

Each program of the first pass keeps the best tokens of its part of the vocabulary, as packed pairs of order key and
index, so that equal logits come out in order of index and every index once; the second merges them.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere
from baton_kernels.rt.language import jit, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer
from baton_kernels.sampler import reference
from baton_kernels.sampler.lanes import NOTHING, finite, index_of, pack, value
from baton_kernels.sampler.sample import SampleShape, check_dense, refuses

MOST = 20  # best tokens
SMALLEST_BLOCK = 2048  # logits per program of the first pass


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchLogprobs:
    """The specification."""

    programs: Sequence[Program] = ()

    def __call__(
        self,
        logits: Tensor,
        at: Tensor,
        tokens: Tensor,
        top: int,
        *,
        chosen: Tensor | None = None,
        ids: Tensor | None = None,
        values: Tensor | None = None,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits float32[S, vocab] at positions int64[L], of tokens int64[S] and of the `top` best ones:
        chosen float32[L], ids int64[L, top], values float32[L, top]; written where given, new tensors otherwise.

        workspace: scratch of Triton's, see `scratch`.
        """
        found = reference.log_probabilities(logits[at], tokens[at], top)
        given = (chosen, ids, values)
        one, two, three = (new if out is None else out.copy_(new) for new, out in zip(found, given, strict=True))
        return one, two, three


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def best_of_splits(
    LOGITS, AT, SUMS, BEST, top,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """One program per reported position and BLOCK logits: maximum, sum of exponentials, `top` best pairs."""
    report, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROW = LOGITS + tl.load(AT + report) * VOCAB
    at = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(ROW + at, mask=at < VOCAB, other=float("-inf"))
    largest = tl.max(x, 0)
    slot = report * SPLITS + split
    tl.store(SUMS + slot * 2, largest)
    tl.store(SUMS + slot * 2 + 1, tl.sum(tl.exp(x - finite(largest)), 0))
    pairs = tl.where(at < VOCAB, pack(x, at), NOTHING)
    for place in range(top):
        best = tl.max(pairs, 0)
        tl.store(BEST + slot * PLACES + place, best)
        pairs = tl.where(pairs == best, NOTHING, pairs)


@jit
def merge_best(
    LOGITS, AT, TOKENS, SUMS, BEST, CHOSEN, IDS, VALUES, top,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
    PLACES: tl.constexpr, PLACE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per reported position."""
    report = tl.program_id(0).to(tl.int64)
    position = tl.load(AT + report)
    split, place = tl.arange(0, SPLIT_BLOCK), tl.arange(0, PLACE_BLOCK)
    maxima = tl.load(SUMS + (report * SPLITS + split) * 2, mask=split < SPLITS, other=float("-inf"))
    sums = tl.load(SUMS + (report * SPLITS + split) * 2 + 1, mask=split < SPLITS, other=0.0)
    largest = finite(tl.max(maxima, 0))
    norm = largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), 0))
    x = tl.load(LOGITS + position * VOCAB + tl.load(TOKENS + position))
    tl.store(CHOSEN + report, x - norm)
    inside = (split < SPLITS)[:, None] & (place < top)[None, :]
    pairs = tl.load(
        BEST + (report * SPLITS + split[:, None]) * PLACES + place[None, :], mask=inside, other=NOTHING
    )  # fmt: skip
    for nth in range(top):
        best = tl.max(tl.max(pairs, 1), 0)
        tl.store(IDS + report * top + nth, index_of(best).to(tl.int64))
        tl.store(VALUES + report * top + nth, value((best >> 32).to(tl.int32)) - norm)
        pairs = tl.where(pairs == best, NOTHING, pairs)


def scratch(shape: SampleShape, reports: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scratch of calls for at most so many positions; see `SampleShape.workspace`."""
    splits = reports * -(-shape.vocab // SMALLEST_BLOCK)
    return (
        torch.empty((splits, 2), dtype=torch.float32, device=device),
        torch.empty((splits, MOST), dtype=torch.int64, device=device),
    )


class TritonLogprobs:
    """See `TorchLogprobs.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: SampleShape, config: Config) -> None:
        assert config["BLOCK"] >= SMALLEST_BLOCK, "the workspace has no room for smaller ones"
        self._shape = shape
        self._splits = -(-shape.vocab // config["BLOCK"])
        reals, integers = pointer(torch.float32), pointer(torch.int64)
        self._best = Program(
            best_of_splits,
            types={"LOGITS": reals, "AT": integers, "SUMS": reals, "BEST": integers, "top": "i32"},
            constants={"VOCAB": shape.vocab, "BLOCK": config["BLOCK"], "SPLITS": self._splits, "PLACES": MOST},
            config={"num_warps": config["num_warps"], "num_stages": 1},
            capabilities=capabilities,
        )
        self._merge = Program(
            merge_best,
            types={
                "LOGITS": reals,
                "AT": integers,
                "TOKENS": integers,
                "SUMS": reals,
                "BEST": integers,
                "CHOSEN": reals,
                "IDS": integers,
                "VALUES": reals,
                "top": "i32",
            },
            constants={
                "VOCAB": shape.vocab,
                "SPLITS": self._splits,
                "SPLIT_BLOCK": 1 << (self._splits - 1).bit_length(),
                "PLACES": MOST,
                "PLACE_BLOCK": 32,
            },
            config={"num_warps": config["num_warps"], "num_stages": 1},
            capabilities=capabilities,
        )
        self.programs = (self._best, self._merge)

    def __call__(
        self,
        logits: Tensor,
        at: Tensor,
        tokens: Tensor,
        top: int,
        *,
        chosen: Tensor | None = None,
        ids: Tensor | None = None,
        values: Tensor | None = None,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        reports, top, where = at.shape[0], min(top, self._shape.vocab), logits.device
        if top > MOST:
            raise InputError(f"{top} best tokens are wanted, at most {MOST} can be had")
        chosen = torch.empty(reports, device=where) if chosen is None else chosen
        ids = torch.empty((reports, top), dtype=torch.int64, device=where) if ids is None else ids
        values = torch.empty((reports, top), device=where) if values is None else values
        sums, best = scratch(self._shape, reports, where) if workspace is None else workspace
        for tensor, name, size in (
            (logits, "logits", (None, self._shape.vocab)),
            (at, "at", (reports,)),
            (tokens, "tokens", (logits.shape[0],)),
            (chosen, "chosen", (reports,)),
            (ids, "ids", (reports, top)),
            (values, "values", (reports, top)),
            (sums, "workspace", (None, 2)),
            (best, "workspace", (sums.shape[0], MOST)),
        ):
            check_dense(tensor, name, size)
        if sums.shape[0] < reports * self._splits:
            raise InputError(f"workspace has {sums.shape[0]} parts, {reports * self._splits} are needed")
        self._best((reports, self._splits, 1), logits, at, sums, best, top)
        self._merge((reports, 1, 1), logits, at, tokens, sums, best, chosen, ids, values, top)
        return chosen, ids, values


def _configs(_capabilities: Capabilities, _shape: SampleShape) -> Sequence[Config]:
    return [{"BLOCK": block, "num_warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8)]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: SampleShape, reports: int) -> Traffic:
    """Reads the logits once."""
    return Traffic(bytes=reports * shape.vocab * 4, flops=4 * reports * shape.vocab)


def _call(
    shape: SampleShape, positions: int, reports: int, top: int, random: torch.Generator, device: torch.device
) -> Call:
    logits = torch.randn(positions, shape.vocab, generator=random) * 3
    logits[::2, : shape.vocab // 2] = float("-inf")
    arguments = {
        "logits": logits,
        "at": torch.randperm(positions, generator=random)[:reports],
        "tokens": torch.randint(shape.vocab // 2, shape.vocab, (positions,), generator=random),
        "chosen": torch.empty(reports),
        "ids": torch.empty(reports, top, dtype=torch.int64),
        "values": torch.empty(reports, top),
    }
    placed = {name: value.to(device) for name, value in arguments.items()}
    return Call(
        arguments={**placed, "top": top, "workspace": scratch(shape, reports, device)},
        outputs=("chosen", "ids", "values"),
        exact=("ids",),
    )


def cases() -> Sequence[Case[SampleShape]]:
    """Few and many of the best; one split and several; nobody; banned tokens."""
    small = [(60, 3, 2, 20), (60, 2, 2, 0), (9000, 2, 1, 5), (300, 2, 0, 3)]
    found = [_case(*one, bench=False) for one in small]
    return found + [_case(128256, 64, reports, 20, bench=True) for reports in (1, 64)]


def _case(vocab: int, positions: int, reports: int, top: int, *, bench: bool) -> Case[SampleShape]:
    shape = SampleShape(vocab=vocab)
    return Case(
        name=f"{shape.label}-r{reports}-top{top}",
        shape=shape,
        make=partial(_call, shape, positions, reports, top),
        traffic=model(shape, reports),
        bench=bench,
    )


FAMILY: Family[SampleShape, TorchLogprobs | TritonLogprobs] = Family(
    op="logprobs",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonLogprobs, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, _shape, _config: TorchLogprobs()),
    ),
    shapes=lambda _capabilities: [SampleShape(vocab=vocab) for vocab in (32000, 128256, 262144)],
    cases=cases,
    expects={"best_of_splits": ("wide load",)},
)
