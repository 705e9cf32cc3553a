"""One choice of one request on its way through the workers.

    SEEKING -> RESERVING -> PREFILLING -> HANDOVER -> DECODING -> ENDED
    SEEKING -> DECODING (LOCAL: decode or a colocated worker does the prompt itself), RESERVING -> DECODING (same)
    any but ENDED -> SEEKING (a worker failed: next attempt, with the outputs so far as part of the tokens) or ENDED

Invariants: the sink hears each output position once and in order, then one end: a token with a finish reason, or an
error. At most one leg per role is open; none after ENDED. Event-driven, no task: links call in, one timer per wait.
It does not know text, JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton_common.errors import BatonError, DeadlineExceeded, Draining, ErrorKind, Overloaded
from baton_common.hashing import token_bytes
from baton_common.telemetry import UNRECORDED, Span
from baton_proto import worker_pb2 as wire
from baton_router.fleet import Assignment, Fleet
from baton_router.links import Leg, Token, WorkerLost
from baton_router.metrics import RouterMetrics
from baton_router.policy import Refusal, WorkerRole
from baton_router.tokens import Prompt

log = logging.getLogger("baton.router.flight")

MAX_FAILURES = 6
"""Attempts that failed without one new token between them; then the last error is the answer."""
HANDOVER_GRACE_S = 1.0
"""Prefill was lost after its token: decode may have everything already, or will say so itself."""
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
DEFAULT_RETRY_AFTER_MS = 1000


class Phase(Enum):
    SEEKING = "seeking a worker"
    RESERVING = "reserving on decode"
    PREFILLING = "prefilling"
    HANDOVER = "handing over to decode"
    DECODING = "decoding"
    ENDED = "ended"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.SEEKING: frozenset({Phase.RESERVING, Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.RESERVING: frozenset({Phase.PREFILLING, Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.PREFILLING: frozenset({Phase.HANDOVER, Phase.SEEKING, Phase.ENDED}),
    Phase.HANDOVER: frozenset({Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.DECODING: frozenset({Phase.SEEKING, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class NoWorker(Draining):
    """Nobody can take the request now."""


class Sink(Protocol):
    """Where the outputs of a flight go. Must not raise."""

    def on_output(self, token: Token) -> None: ...
    def on_error(self, error: BatonError) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is flown. Times on the event loop's clock."""

    request_id: str
    prompt: Prompt
    sampling: wire.Sampling
    deadline_s: float
    worker_wait_s: float
    resume_wait_s: float
    local_below_tokens: int
    priority: int = 0
    span: Span = UNRECORDED
    """Hears where the request went; its name is handed on to the workers."""
    keep: wire.KvKeep | None = None


def submission(
    order: Order, mode: wire.SubmitMode, *, outputs: Sequence[int], now_s: float, ticket: wire.Ticket | None = None
) -> wire.Submit:
    """What one worker is told of an order; `outputs` are the tokens made so far, elsewhere."""
    left_ms = max(int((order.deadline_s - now_s) * 1000), 1)
    message = wire.Submit(
        request_id=order.request_id,
        mode=mode,
        tokens=order.prompt.raw + token_bytes(outputs) if outputs else order.prompt.raw,
        prompt_tokens=len(order.prompt.ids),
        sampling=order.sampling,
        deadline_ms=min(left_ms, 2**32 - 1),
        cache_salt=order.prompt.cache_salt,
        traceparent=order.span.traceparent,
        priority=order.priority,
    )
    if mode == wire.SUBMIT_MODE_RESERVE:
        message.local_below_tokens = order.local_below_tokens
    if order.keep is not None and mode != wire.SUBMIT_MODE_PREFILL:  # kept where the request ends
        message.keep.CopyFrom(order.keep)
    if ticket is not None:
        message.ticket.CopyFrom(ticket)
    return message


class Flight:
    """Owns the legs of one choice until it ended."""

    def __init__(self, order: Order, fleet: Fleet, sink: Sink, metrics: RouterMetrics) -> None:
        self.phase = Phase.SEEKING
        self._order = order
        self._fleet = fleet
        self._sink = sink
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._outputs: list[int] = []
        self._early: dict[int, Token] = {}  # decode may be faster than prefill's message
        self._decode: Leg | None = None
        self._prefill: Leg | None = None
        self._assigned: Assignment | None = None
        self._gone: set[str] = set()  # worker keys that drain: they do not come back
        self._failed: set[str] = set()  # worker keys that failed this request lately
        self._busy: dict[str, int] = {}  # worker keys that refused for load -> retry after, ms
        self._failures = 0
        self._pauses = 0
        self._last_error: BatonError | None = None
        self._seeking_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # ---- from the client's side

    def start(self) -> None:
        """Leave. The sink may be called before this returns."""
        self._deadline = self._loop.call_at(self._order.deadline_s, self._on_deadline)
        self._seeking_since_s = self._loop.time()
        self._seek()

    def abort(self, reason: str) -> None:
        """The client went away or has enough: both workers are told, the sink hears nothing more. Idempotent."""
        if self.phase is not Phase.ENDED:
            self._end(reason)

    # ---- attempts

    def _seek(self) -> None:
        self._stop_waiting()
        if self.phase is not Phase.SEEKING:
            return
        found = self._choose(self._failed | self._gone, set(self._busy))
        if isinstance(found, Assignment):
            self._reserve(found)
        elif found is Refusal.OVERLOADED and not self._outputs:
            after_ms = max(self._busy.values()) or DEFAULT_RETRY_AFTER_MS
            self._fail(Overloaded("all workers are at capacity; try again later", retry_after_ms=after_ms))
        else:
            self._wait()

    def _choose(self, failed: set[str], busy: set[str]) -> Assignment | Refusal:
        order = self._order
        tokens = len(order.prompt.ids) + len(self._outputs)
        return self._fleet.choose(order.prompt, tokens, order.local_below_tokens, failed, busy)

    def _reserve(self, found: Assignment) -> None:
        self._assigned = found
        self._early.clear()
        local = found.prefill is None or found.role is WorkerRole.COLOCATED
        mode = wire.SUBMIT_MODE_LOCAL if local else wire.SUBMIT_MODE_RESERVE
        self._advance(Phase.DECODING if local else Phase.RESERVING)
        if local:
            self._placed("local")
        # with a reservation the decode worker computes nothing, so it is charged nothing
        charge = found.decode_tokens if local or found.decode_tokens < self._order.local_below_tokens else 0
        self._decode = found.decode.submit(self._submission(mode), self, charge)

    def _submission(self, mode: wire.SubmitMode, ticket: wire.Ticket | None = None) -> wire.Submit:
        return submission(self._order, mode, outputs=self._outputs, now_s=self._loop.time(), ticket=ticket)

    def _placed(self, how: str) -> None:
        """The span keeps every attempt as an event, and the newest as its attributes."""
        self._metrics.placed(how)
        assert self._assigned is not None
        where = self._assigned.told(how)
        self._order.span.set(where)
        self._order.span.event("placed", {**where, "baton.request_id": self._order.request_id})

    def _wait(self) -> None:
        """Nobody fits. Those that failed get another chance after a pause; else a change of the fleet wakes us."""
        now_s = self._loop.time()
        limit_s = self._order.resume_wait_s if self._outputs else self._order.worker_wait_s
        give_up_s = self._seeking_since_s + limit_s
        if self._failed or self._busy:
            pause_s = min(RETRY_MIN_S * 2**self._pauses, RETRY_MAX_S)
            self._pauses = min(self._pauses + 1, 10)
            self._failed.clear()
            self._busy.clear()
            self._timer = self._loop.call_later(pause_s, self._seek)
        elif now_s >= give_up_s:
            self._fail(self._nobody())
            return
        else:
            self._timer = self._loop.call_at(give_up_s, self._seek)
        self._fleet.on_next_change(self._seek)

    def _nobody(self) -> BatonError:
        reasons = "; ".join(self._fleet.readiness().reasons) or "no worker fits"
        last = f" (last error: {self._last_error})" if self._last_error else ""
        return NoWorker(f"no worker can take the request: {reasons}{last}", retry_after_ms=DEFAULT_RETRY_AFTER_MS)

    def _retry(self, error: BatonError, worker: str) -> None:
        """Leave the present workers and look for others; `worker` is the one to blame."""
        self._last_error = error
        self._close_legs(f"retried elsewhere: {error}")
        if error.kind is ErrorKind.OVERLOADED:
            self._busy[worker] = error.retry_after_ms
        elif error.kind is ErrorKind.DRAINING:
            self._gone.add(worker)
        else:
            self._failed.add(worker)
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._fail(BatonError(f"gave up after {self._failures} attempts; last: {error}", kind=error.kind))
                return
        self._metrics.retried("lost" if isinstance(error, WorkerLost) else error.kind.value)
        self._order.span.event("retry", {"baton.worker": worker, "baton.error": error.message})
        log.warning(
            "retrying after: %s", error, extra={"request": self._order.request_id, "outputs": len(self._outputs)}
        )
        if self.phase is not Phase.SEEKING:
            self._seeking_since_s = self._loop.time()
            self._advance(Phase.SEEKING)
        self._seek()

    # ---- from the links (LegEvents)

    def on_ticket(self, leg: Leg, ticket: wire.Ticket) -> None:
        if leg is not self._decode or self.phase is not Phase.RESERVING:
            return
        if ticket.local:
            self._placed("local_short")
            self._advance(Phase.DECODING)
            return
        assigned = self._assigned
        assert assigned is not None
        assert assigned.prefill is not None
        if not assigned.prefill.up or assigned.prefill.key != assigned.prefill_key:
            self._retry(Draining("the prefill worker went away while decode reserved"), assigned.prefill_key)
            return
        self._placed("handoff")
        self._advance(Phase.PREFILLING)
        submission = self._submission(wire.SUBMIT_MODE_PREFILL, ticket)
        self._prefill = assigned.prefill.submit(submission, self, assigned.prefill_tokens)

    def on_token(self, leg: Leg, token: Token) -> None:
        if leg is self._prefill:
            if self.phase is Phase.PREFILLING:
                self._advance(Phase.HANDOVER)
        elif leg is not self._decode:
            return
        expected = len(self._outputs)
        if token.position != expected:
            if token.position > expected:
                self._early[token.position] = token
            return
        self._accept(token, from_prefill=leg is self._prefill)
        while (follower := self._early.pop(len(self._outputs), None)) is not None:
            leg = self._decode or leg
            self._accept(follower, from_prefill=False)
        if self.phase is Phase.HANDOVER and leg is self._decode:
            self._advance(Phase.DECODING)
            self._stop_waiting()
            if self._prefill is not None:
                self._prefill.release()
                self._prefill = None

    def _accept(self, token: Token, *, from_prefill: bool) -> None:
        self._outputs.append(token.token_id)
        self._failures = self._pauses = 0
        if token.position == 0:
            self._order.span.event("first_token", {"baton.request_id": self._order.request_id})
        if token.finish:
            if from_prefill and self._decode is not None:
                self._decode.abort("finished with its first token")  # it still holds its reservation
            self._end(None)
        self._sink.on_output(token)

    def on_failed(self, leg: Leg, error: BatonError) -> None:
        if leg is self._prefill:
            self._prefill = None
            blamed = self._assigned.prefill_key if self._assigned else ""
            if self.phase is Phase.HANDOVER and error.kind.retriable:
                self._await_decode(error, blamed)
                return
        elif leg is self._decode:
            self._decode = None
            assigned = self._assigned
            blamed = assigned.decode_key if assigned else ""
            if error.kind is ErrorKind.TRANSFER and assigned and assigned.prefill_key:
                blamed = assigned.prefill_key  # another source, or none, is the likelier cure
        else:
            return
        if error.kind.retriable:
            self._retry(error, blamed)
        else:
            self._fail(error)

    def on_silent(self, leg: Leg) -> None:
        """The worker is connected but gives no sign. Leave it when, and only when, others can take over."""
        if leg is self._prefill and self.phase is Phase.PREFILLING:
            blamed = self._assigned.prefill_key if self._assigned else ""
        elif leg is self._decode:
            blamed = self._assigned.decode_key if self._assigned else ""
        else:  # after its token, prefill's silence shows in what decode says
            return
        if isinstance(self._choose({*self._failed, *self._gone, blamed}, set()), Assignment):
            self._retry(BatonError(f"worker {blamed} is silent"), blamed)

    def on_defect(self, leg: Leg) -> None:
        if self.phase is not Phase.ENDED:
            self._fail(BatonError("internal error of the router; its log has the details"))

    # ---- ends and waits

    def _await_decode(self, error: BatonError, blamed: str) -> None:
        self._stop_waiting()
        self._timer = self._loop.call_later(HANDOVER_GRACE_S, self._retry, error, blamed)

    def _on_deadline(self) -> None:
        self._fail(DeadlineExceeded(f"the request's deadline passed while {self.phase.value}"))

    def _fail(self, error: BatonError) -> None:
        if self.phase is Phase.ENDED:
            return
        error.request_id = self._order.request_id
        self._end(error.message)
        self._sink.on_error(error)

    def _end(self, abort_reason: str | None) -> None:
        self._close_legs(abort_reason)
        self._stop_waiting()
        if self._deadline is not None:
            self._deadline.cancel()
        self._early.clear()
        self._advance(Phase.ENDED)

    def _close_legs(self, abort_reason: str | None) -> None:
        for leg in (self._decode, self._prefill):
            if leg is not None and abort_reason is not None:
                leg.abort(abort_reason)
            elif leg is not None:
                leg.release()
        self._decode = self._prefill = None
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fleet.forget(self._seek)

    def _advance(self, to: Phase) -> None:
        assert to in TRANSITIONS[self.phase], f"{self.phase} -> {to}"
        self.phase = to
