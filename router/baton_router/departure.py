"""What lies between the wish to stop and the end of the process: clients go elsewhere, and none of them sees an error.

    SERVING -> LINGERING (new requests are still served) -> REFUSING (told to come back) -> over

From the start /ready is false and every answer closes its connection, so that the next request of that client meets
another router. Whoever sends requests here needs a moment to notice, hence the lingering. It is over when no answer is
open and nobody has asked for a while, and in any case after `drain_s`. Pure: it looks at a clock and ends nothing.
"""

from __future__ import annotations

import math

from baton_common.clock import Clock

LINGER_S = 5.0
"""Long enough for a Service, whose endpoints change within a second or two, and for two rounds of a readiness probe."""
QUIET_S = 2.0
RETRY_AFTER_MS = 1000


class Departure:
    """Of one router. Times on the clock that is passed in."""

    def __init__(self, drain_s: float, clock: Clock) -> None:
        self._drain_s = drain_s
        self._clock = clock
        self._began_at_s: float | None = None
        self._linger_s = 0.0
        self._asked_at_s = -math.inf

    def begin(self, *, linger: bool) -> None:
        """The first word counts. Only sets numbers, so a signal handler may call it."""
        if self._began_at_s is None:
            self._began_at_s = self._clock.now()
            self._linger_s = min(LINGER_S, self._drain_s / 2) if linger else 0.0

    def asked(self) -> None:
        """A client sent a request."""
        self._asked_at_s = self._clock.now()

    @property
    def under_way(self) -> bool:
        return self._began_at_s is not None

    @property
    def refuses(self) -> bool:
        """New requests are not taken any more."""
        return self._began_at_s is not None and self._clock.now() - self._began_at_s >= self._linger_s

    @property
    def left_s(self) -> float:
        """Time that open answers still have."""
        if self._began_at_s is None:
            return self._drain_s
        return max(self._began_at_s + self._drain_s - self._clock.now(), 0.0)

    def over(self, open_answers: int) -> bool:
        """True when the process may go."""
        if self._began_at_s is None:
            return False
        quiet = not self._linger_s or self._clock.now() - self._asked_at_s >= QUIET_S
        return self.left_s <= 0.0 or (quiet and not open_answers)
