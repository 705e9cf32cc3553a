"""How a step's tokens are chosen on a device: what the ways to do it get to know, and what they promise.

`grouped` sorts the positions of a step by what they need, so that a row pays only for what it asks: a CPU's way.
`fused` hands the whole mix to one sequence of kernels: a GPU's way. Both choose the same token for the same row,
whatever the rest of the batch. They know neither requests nor rows' owners; those are the sampler's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton_engine.request import SamplingParams

Ids = NDArray[np.int64]
Upload = Callable[[NDArray[Any]], Tensor]


class Need(IntFlag):
    """What a row wants beyond argmax. The first two are those of the kernels' `Flags`."""

    NOISE = 1
    TRUNCATE = 2
    PENALTY = 4
    BIAS = 8
    MIN_TOKENS = 16
    LOGPROBS = 32


@dataclass(slots=True, kw_only=True)
class Tables:
    """Parameters of all rows, and histories of those with penalties. On the device; touched in stream order."""

    reals: Tensor  # float32[rows, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty
    integers: Tensor  # int64[rows, 2]: seed, top_k
    counts: Tensor  # int32[slots, vocab] of outputs
    in_prompt: Tensor  # bool[slots, vocab]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The sampled positions of one step, in their order. On the host."""

    rows: Ids  # of the tables
    needs: Ids
    positions: Ids  # of the tokens in their requests' outputs
    slots: Ids  # of the histories, -1 = none
    params: Sequence[SamplingParams]
    banned: Mapping[int, Collection[int]]  # index of a position -> tokens that it must not choose yet


Choose = Callable[[Tensor, Tables], Tensor]
"""(logits float32[S, vocab], changed in place; tables) -> tokens int64[S], counted where there are penalties."""


class Chooser(Protocol):
    """One way."""

    def greedy(self, positions: int) -> Choose:
        """Argmax of each position; uploads nothing."""

    def plan(self, wanted: Wanted) -> Choose:
        """On the planning thread: all that needs no device state, and the uploads. The result runs in stream order."""

    def parts(self, at: Ids) -> Sequence[Ids]:
        """Positions that are best looked at together."""

    def log_probabilities(self, logits: Tensor, at: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """See the kernels' function, of positions `at`; in stream order. tokens: int64[S]."""
