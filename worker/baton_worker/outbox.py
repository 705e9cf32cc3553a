"""From the engine's and the transfer's threads to the event loop: one ordered queue, one wake-up per burst.

Order: what one thread puts first is delivered first; across threads, in the order of the puts. A step causes at most
one wake-up of the loop, however many events it makes. Puts never block and never raise; after `close` they are dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from baton_common.errors import BatonError
from baton_common.ids import PageHash, RequestId, TransferId
from baton_engine.role import TokenOut
from baton_kvtransfer.records import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """All tokens of one step, for all routers."""

    step: int
    tokens: tuple[TokenOut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """RESERVE was granted: pages are leased, or (`local`) the request started by itself."""

    request_id: RequestId
    transfer_id: TransferId | None
    first_missing_token: int
    cached_tokens: int
    local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The request owns nothing any more. The last event of every request."""

    request_id: RequestId
    error: BatonError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvChanged:
    """The prefix tree changed."""

    stored: tuple[PageHash, ...]
    removed: tuple[PageHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMoved:
    """KV of the request crossed between two workers. For its spans; before its Ended."""

    request_id: RequestId
    what: Literal["handoff", "pull"]
    sent: bool  # else received
    receipt: Receipt


Event = StepTokens | Reserved | Ended | KvChanged | KvMoved


class Outbox:
    """Created and opened by the event loop's side; `put` is for all other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deliver: Callable[[Sequence[Event]], None] | None = None
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._waking = False
        self._closed = False

    def put(self, event: Event, *, wake: bool = True) -> None:
        """`wake` False: it may wait for whatever comes next."""
        with self._lock:
            if self._closed:
                return
            self._events.append(event)
            if wake and not self._waking:  # under the lock, so that `close` is a fence
                self._waking = True
                self._loop.call_soon_threadsafe(self._drain)

    def open(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        """`deliver` runs on the loop with everything that was put since it last ran; what was put before, now."""
        self._deliver = deliver
        self._drain()

    def close(self) -> None:
        """Deliver what is there, drop what comes later. On the loop."""
        with self._lock:
            self._closed = True
        self._drain()

    def _drain(self) -> None:
        if self._deliver is None:
            return
        with self._lock:
            events, self._events = self._events, []
            self._waking = False
        if events:
            self._deliver(events)
