"""One choice of one request on its way through the workers.

    SEEKING -> RESERVING -> PREFILLING -> HANDOVER -> DECODING -> ENDED
    SEEKING -> DECODING (LOCAL: decode or a colocated worker does the prompt itself), RESERVING -> DECODING (same)
    DECODING -> MOVING (its worker drains, another is asked for room) -> DECODING (no room: stay)
    MOVING -> PREFILLING: decode goes to the other worker, and the one that drains prefills from its own cache
    any but ENDED -> SEEKING (a worker failed: next attempt, with the outputs so far as part of the tokens) or ENDED

Invariants: the sink hears each output position once and in order, then one end: a token with a finish reason, or an
error. At most one leg per role is open, and one reservation while MOVING; none after ENDED. A token that is made twice,
because the old worker decoded while the new one reserved, must be the same. Event-driven, no task: links call in, one
timer per wait.
It does not know text, JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Protocol

from baton_common.errors import BatonError, DeadlineExceeded, Draining, ErrorKind, Overloaded
from baton_proto import worker_pb2 as wire
from baton_router.fleet import Assignment, Fleet
from baton_router.links import Leg, Token, WorkerLost
from baton_router.metrics import RouterMetrics
from baton_router.moving import Move
from baton_router.order import Order, submission
from baton_router.policy import Refusal, WorkerRole

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
    MOVING = "decoding, and reserving on another decode worker"
    ENDED = "ended"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.SEEKING: frozenset({Phase.RESERVING, Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.RESERVING: frozenset({Phase.PREFILLING, Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.PREFILLING: frozenset({Phase.HANDOVER, Phase.SEEKING, Phase.ENDED}),
    Phase.HANDOVER: frozenset({Phase.DECODING, Phase.SEEKING, Phase.ENDED}),
    Phase.DECODING: frozenset({Phase.MOVING, Phase.SEEKING, Phase.ENDED}),
    Phase.MOVING: frozenset({Phase.DECODING, Phase.PREFILLING, Phase.SEEKING, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class NoWorker(Draining):
    """Nobody can take the request now."""


class Sink(Protocol):
    """Where the outputs of a flight go. Must not raise."""

    def on_output(self, token: Token) -> None: ...
    def on_error(self, error: BatonError) -> None: ...


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
        self._move = Move(order, fleet, self)
        self._moving = False  # the other worker has room, and has made no token yet
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
        tokens = len(self._order.prompt.ids) + len(self._outputs)
        return self._fleet.choose(self._order, tokens, failed, busy)

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
        self._moved("failed")
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
        if token.position > expected:
            self._early[token.position] = token
            return
        if token.position < expected:
            self._compare(token)
            return
        self._accept(token, from_prefill=leg is self._prefill)
        while (follower := self._early.pop(len(self._outputs), None)) is not None:
            leg = self._decode or leg
            self._accept(follower, from_prefill=False)
        if self.phase is Phase.HANDOVER and leg is self._decode:
            self._advance(Phase.DECODING)
            self._moved("moved")
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

    def on_draining(self, leg: Leg) -> None:
        """The worker wants to be empty soon, and says so again and again. Without outputs there is little to save."""
        movable = leg is self._decode and self.phase is Phase.DECODING and self._outputs
        if movable and self._move.begin(leg.link, self._outputs, self._failed | self._gone):
            self._advance(Phase.MOVING)

    def on_defect(self, leg: Leg) -> None:
        if self.phase is not Phase.ENDED:
            self._fail(BatonError("internal error of the router; its log has the details"))

    # ---- from the move

    def on_room(self, found: Assignment, target: Leg, ticket: wire.Ticket, outputs: int) -> None:
        """Decode goes to `target`. Its old worker has nearly all of the KV in its cache, and hands it over."""
        assert self.phase is Phase.MOVING, self.phase
        assert self._decode is not None, "it still decodes"
        assert found.prefill is not None, "the worker that drains"
        self._decode.abort("moves to another decode worker")
        self._assigned, self._decode, self._moving = found, target, True
        self._early.clear()
        if ticket.local:
            self._placed("local_short")
            self._advance(Phase.DECODING)
            self._moved("moved")
            return
        self._placed("move")
        self._advance(Phase.PREFILLING)
        sent, now_s = self._outputs[:outputs], self._loop.time()
        prefill = submission(self._order, wire.SUBMIT_MODE_PREFILL, outputs=sent, now_s=now_s, ticket=ticket)
        self._prefill = found.prefill.submit(prefill, self, 0)

    def on_no_room(self, error: BatonError) -> None:
        log.info("stays where it is: %s", error, extra={"request": self._order.request_id})
        self._metrics.migrated("refused")
        self._advance(Phase.DECODING)

    def _compare(self, token: Token) -> None:
        """Made before; by another worker if the request moved. An answer that forks there must not go on."""
        if self._moving and (token.finish or token.token_id != self._outputs[token.position]):
            assert self._assigned is not None
            fork = BatonError(f"output {token.position} came out differently after the move")
            self._retry(fork, self._assigned.decode_key)

    def _moved(self, outcome: str) -> None:
        if self._moving:
            self._moving = False
            self._metrics.migrated(outcome)

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
        self._move.stop(abort_reason or "the answer is complete")
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fleet.forget(self._seek)

    def _advance(self, to: Phase) -> None:
        assert to in TRANSITIONS[self.phase], f"{self.phase} -> {to}"
        self.phase = to
