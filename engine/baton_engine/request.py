"""One request inside one worker: what was asked, and where it is in its life.

One enum, one transition table. Every transition is stamped with a monotonic time; metrics, spans and replay read those
stamps. The table is the specification: an edge that is not in it is a bug, and `advance` raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from baton_common.errors import BatonError
from baton_common.ids import PageHash, RequestId, TransferId


class Mode(Enum):
    """What the router asked this worker to do."""

    LOCAL = "local"  # prefill and decode here
    PREFILL = "prefill"  # compute the prompt and token #1, hand the KV over
    RESERVE = "reserve"  # lease pages, receive the KV, decode from token #2


class Phase(Enum):
    QUEUED = "queued"  # waiting for admission; owns nothing
    FILLING = "filling"  # owns pages; KV of its prompt may come from elsewhere; LOCAL and PREFILL then wait for a row
    PREFILLING = "prefilling"  # owns a row and pages; part of the prompt is computed
    SENDING = "sending"  # PREFILL mode: token #1 exists, the last chunks are on the way
    HANDED_OFF = "handed_off"  # PREFILL mode: the receiver committed
    RESERVED = "reserved"  # RESERVE mode: owns pages, no byte has arrived
    RECEIVING = "receiving"  # RESERVE mode: chunks arrive
    READY = "ready"  # RESERVE mode: KV complete and verified, waits for a row
    RUNNING = "running"  # decodes
    PREEMPTED = "preempted"  # lost its pages, its last step is in flight; will be recomputed
    FINISHED = "finished"  # has its last token
    ABORTING = "aborting"  # error or abort; no more steps will be planned
    FENCING = "fencing"  # waits until nothing touches its pages (step, gather, scatter in flight)
    FREED = "freed"  # owns nothing; terminal


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.FILLING, Phase.PREFILLING, Phase.RESERVED, Phase.ABORTING}),
    Phase.FILLING: frozenset({Phase.PREFILLING, Phase.RESERVED, Phase.ABORTING}),
    Phase.PREFILLING: frozenset({Phase.RUNNING, Phase.SENDING, Phase.PREEMPTED, Phase.FINISHED, Phase.ABORTING}),
    Phase.SENDING: frozenset({Phase.HANDED_OFF, Phase.ABORTING}),
    Phase.HANDED_OFF: frozenset({Phase.FENCING}),
    Phase.RESERVED: frozenset({Phase.RECEIVING, Phase.READY, Phase.ABORTING}),
    Phase.RECEIVING: frozenset({Phase.READY, Phase.ABORTING}),
    Phase.READY: frozenset({Phase.RUNNING, Phase.FINISHED, Phase.PREEMPTED, Phase.ABORTING}),
    Phase.RUNNING: frozenset({Phase.FINISHED, Phase.PREEMPTED, Phase.ABORTING}),
    Phase.PREEMPTED: frozenset({Phase.QUEUED, Phase.FINISHED, Phase.ABORTING}),
    Phase.FINISHED: frozenset({Phase.FENCING}),
    Phase.ABORTING: frozenset({Phase.FENCING}),
    Phase.FENCING: frozenset({Phase.FREED}),
    Phase.FREED: frozenset(),
}


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked at the edge (router) and again by `validate` in the sampler."""

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, HF semantics
    presence_penalty: float = 0.0  # over output, OpenAI semantics
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # noise = f(seed, output position): equal in any batch, on any worker
    max_tokens: int = 16  # outputs in all
    min_tokens: int = 0  # end-of-sequence and stop ids are masked before
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The KV of the request is to be kept after its end, for the next turn. The engine only carries it to the role."""

    session: str  # a later request of the same session takes the place of this one
    ttl_s: float
    tenant: str = ""  # sessions of one tenant share its quota


@dataclass(slots=True, kw_only=True)
class Request:
    """Mutable record, owned by the engine thread.

    `tokens` grows by each collected output. `tokens[:prompt_tokens]` is what the client wrote; a request that was moved
    after the loss of a worker starts with some outputs already in `tokens`.
    """

    request_id: RequestId
    mode: Mode
    tokens: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    deadline_s: float  # on the engine's clock
    arrival_s: float
    priority: int = 0
    cache_salt: str = ""
    transfer_id: TransferId | None = None  # PREFILL and RESERVE
    send_from_token: int = 0  # PREFILL: the receiver has the KV of everything before
    local_below_tokens: int = 0  # RESERVE: start as LOCAL when fewer tokens are uncached
    keep: Keep | None = None
    fills: bool = False  # the answer of Role.wants_fill, asked when it is submitted
    hashes: list[PageHash] = field(default_factory=list)  # chained, of its full pages from page 0, as far as computed
    phase: Phase = Phase.QUEUED
    stamps: dict[Phase, float] = field(default_factory=dict)
    preemptions: int = 0
    cached_tokens: int = 0  # of the first admission: KV that was found, not computed
    filled_tokens: int = 0  # KV that came while it was FILLING, over all admissions

    @property
    def output_tokens(self) -> int:
        """How many outputs exist, on this worker or before it."""
        return len(self.tokens) - self.prompt_tokens

    def advance(self, to: Phase, now_s: float) -> None:
        """Move along one edge of TRANSITIONS; raises IllegalTransition for any other."""
        if to not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"{self.request_id}: {self.phase.value} -> {to.value}", request_id=self.request_id)
        self.phase = to
        self.stamps[to] = now_s


class IllegalTransition(BatonError):
    """A defect of ours: an edge that is not in the table."""
