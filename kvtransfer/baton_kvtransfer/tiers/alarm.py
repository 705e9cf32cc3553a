"""Calls back at given times, on one thread. It does not know what for; what it calls must not wait."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable
from itertools import count

from baton_common.clock import Clock

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 60.0
"""Then the clock is looked at again."""


class Alarm:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._serials = count()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="baton-tier-alarm", daemon=True)
        self._thread.start()

    def at(self, due_s: float, call: Callable[[], None]) -> None:
        """`due_s` is on the clock. Dropped when it closes before."""
        with self._changed:
            heapq.heappush(self._calls, (due_s, next(self._serials), call))
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Blocks while a call runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                left_s = self._calls[0][0] - self._clock.now() if self._calls else _LONGEST_WAIT_S
                if left_s <= 0:
                    return heapq.heappop(self._calls)[2]
                self._changed.wait(min(left_s, _LONGEST_WAIT_S))
            return None

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:  # a defect of ours must not stop the clock of all others
                log.exception("a call at its time failed")
