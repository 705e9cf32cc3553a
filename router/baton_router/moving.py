"""The first half of a move: a decode worker that drains is still decoding, and another one reserves pages.

Only when the other has said yes is anything taken away, so a fleet that is full costs a draining worker's requests
nothing: they stay, and ask again. Tokens that are made meanwhile are made once more on the other side; the flight
compares them. Event-driven, on the event loop; it does not know tokens or phases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from baton_common.errors import BatonError
from baton_proto import worker_pb2 as wire
from baton_router.fleet import Assignment, Fleet
from baton_router.links import Leg, LegEvents, Link, Token
from baton_router.order import Order, submission

PAUSE_S = 1.0
"""After a refusal that does not say when to come back."""


class Mover(LegEvents, Protocol):
    """The flight that moves."""

    def on_room(self, found: Assignment, target: Leg, ticket: wire.Ticket, outputs: int) -> None:
        """`target` reserved pages for the prompt and the first `outputs` outputs; its leg is the flight's now."""

    def on_no_room(self, error: BatonError) -> None:
        """Stay for now."""


class Move:
    """Of one flight, for all its life. LegEvents of the reservation until it is granted."""

    def __init__(self, order: Order, fleet: Fleet, mover: Mover) -> None:
        self._order = order
        self._fleet = fleet
        self._mover = mover
        self._loop = asyncio.get_running_loop()
        self._leg: Leg | None = None
        self._found: Assignment | None = None
        self._outputs = 0
        self._not_before_s = 0.0

    def begin(self, source: Link, outputs: Sequence[int], avoid: set[str]) -> bool:
        """Ask the best other worker for room. False: there is none, or one was asked just now."""
        now_s = self._loop.time()
        if self._leg is not None or now_s < self._not_before_s:
            return False
        tokens = len(self._order.prompt.ids) + len(outputs)
        found = self._fleet.choose_target(self._order, tokens, source, avoid)
        if found is None:
            return False
        self._found, self._outputs = found, len(outputs)
        message = submission(self._order, wire.SUBMIT_MODE_RESERVE, outputs=outputs, now_s=now_s)
        self._leg = found.decode.submit(message, self, 0)
        return True

    def stop(self, reason: str) -> None:
        """The flight is over, or goes elsewhere. Idempotent."""
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.abort(reason)

    # ---- LegEvents

    def on_ticket(self, leg: Leg, ticket: wire.Ticket) -> None:
        if leg is self._leg and self._found is not None:
            self._leg = None
            leg.events = self._mover
            self._mover.on_room(self._found, leg, ticket, self._outputs)

    def on_token(self, leg: Leg, token: Token) -> None:
        """None comes before the ticket."""

    def on_failed(self, leg: Leg, error: BatonError) -> None:
        if leg is self._leg:
            self._leg = None
            self._not_before_s = self._loop.time() + (error.retry_after_ms / 1000 or PAUSE_S)
            self._mover.on_no_room(error)

    def on_silent(self, leg: Leg) -> None:
        self._leave(leg, "silent")

    def on_draining(self, leg: Leg) -> None:
        self._leave(leg, "draining, too")

    def on_defect(self, leg: Leg) -> None:
        self._mover.on_defect(leg)

    def _leave(self, leg: Leg, why: str) -> None:
        if leg is self._leg:
            leg.abort(why)
            self.on_failed(leg, BatonError(f"the worker that a request should move to is {why}"))
