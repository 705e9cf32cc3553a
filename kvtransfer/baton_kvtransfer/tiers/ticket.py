"""What the stack hands out: a prefetch to be polled, and a copy to be waited for.

A ticket holds the frames that it found, so that they cannot be evicted before they are used: whoever has it ends it, by
`TierStack.restore` or `release`. Threads of the stack write both records, anybody polls them without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton_common.clock import Clock
from baton_common.ids import PageHash
from baton_kvtransfer.tiers.pool import Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    ready: int  # leading pages in host memory, verified
    over: bool  # it will not become more


class Ticket:
    """A run of pages on its way into host memory."""

    def __init__(
        self,
        pages: Sequence[PageHash],
        frames: Sequence[Frame],
        *,
        deadline_s: float,
        clock: Clock,
        release: Callable[[Sequence[Frame]], None],
    ) -> None:
        """`frames`: of the leading pages, held."""
        self.pages = pages
        self._deadline_s = deadline_s
        self._clock = clock
        self._release = release
        self._lock = threading.Lock()
        self._frames = list(frames)
        self._over = len(frames) == len(pages)

    def poll(self) -> Progress:
        with self._lock:
            if self._clock.now() >= self._deadline_s:
                self._over = True
            return Progress(ready=len(self._frames), over=self._over)

    def release(self) -> None:
        """The pages are not wanted any more. May be called again, and after `restore`."""
        self._release(self.take())

    # ---- for the stack -----------------------------------------------------------------------------------------------
    def add(self, frames: Sequence[Frame]) -> bool:
        """The next pages are here; the ticket takes over the hold on them. False: it is over, and took nothing."""
        if self.poll().over:
            return False
        with self._lock:
            if self._over:
                return False
            self._frames += frames
            self._over = len(self._frames) == len(self.pages)
            return True

    def end(self) -> None:
        """Nobody has more of it."""
        with self._lock:
            self._over = True

    def take(self) -> list[Frame]:
        """The frames, with the holds on them; the ticket is over."""
        with self._lock:
            self._over = True
            frames, self._frames = self._frames, []
            return frames


class Copy:
    """A Fence: pages of the engine's pool are read or written until `done()`."""

    def __init__(self) -> None:
        self._pages = 0
        self._done = False

    @property
    def pages(self) -> int:
        """Once done. Offload: pages that are newly in host memory. Restore: leading pages whose KV is in the pool."""
        return self._pages

    def done(self) -> bool:
        return self._done

    def finish(self, pages: int) -> None:
        """For the stack."""
        self._pages = pages
        self._done = True
