"""Progress as log lines, at most one every few seconds."""

from __future__ import annotations

import logging

from baton_common.clock import Clock
from baton_fetch.units import amount, duration

log = logging.getLogger("baton.fetch")

_EVERY_S = 5.0


class Progress:
    """Counts bytes on the disk, not those in the air. One thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun_s = self._said_s = clock.now()
        self.total_bytes = 0
        self.reused_bytes = 0       # were there before this process
        self.fetched_bytes = 0

    @property
    def seconds(self) -> float:
        return self._clock.now() - self._begun_s

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.fetched_bytes / self.seconds if self.seconds > 0 else 0.0

    def restart(self) -> None:
        """The plan is made anew; what was fetched stays fetched."""
        self.total_bytes = 0
        self.reused_bytes = -self.fetched_bytes

    def fetched(self, size_bytes: int, name: str) -> None:
        self.fetched_bytes += size_bytes
        now_s = self._clock.now()
        if now_s - self._said_s >= _EVERY_S:
            self._said_s = now_s
            log.info("%s, %s", self.text(), name)

    def text(self) -> str:
        done = self.reused_bytes + self.fetched_bytes
        left_bytes = max(self.total_bytes - done, 0)
        percent = min(100 * done / self.total_bytes, 100.0) if self.total_bytes else 100.0
        eta = duration(left_bytes / self.rate) if self.rate > 0 else "unknown"
        return f"{percent:.0f} %, {amount(done)} of {amount(self.total_bytes)}, {self.rate / 1e6:.1f} MB/s, ETA {eta}"
