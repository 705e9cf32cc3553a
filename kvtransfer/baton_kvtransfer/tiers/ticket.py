"""What the stack hands out: a prefetch and a copy, both to be polled or to say themselves when they are over.

A ticket holds the frames that it found, so that they cannot be evicted before they are used: whoever has it ends it, by
`TierStack.restore` or `release`. Threads of the stack write both records, anybody polls them without waiting. Callbacks
run once, on the thread that ends the matter, or at once when it is over already; they must not wait.
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
        self._call: Callable[[], None] | None = None

    def poll(self) -> Progress:
        if self._clock.now() >= self._deadline_s:
            self.end()
        with self._lock:
            return Progress(ready=len(self._frames), over=self._over)

    def on_over(self, call: Callable[[], None]) -> None:
        """`call` when no more comes, unless it is restored or released before."""
        with self._lock:
            if not self._over:
                self._call = call
                return
        call()

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
            complete = len(self._frames) == len(self.pages)
        if complete:
            self.end()
        return True

    def end(self) -> None:
        """Nobody has more of it, or it is too late."""
        with self._lock:
            self._over = True
            call, self._call = self._call, None
        if call is not None:
            call()

    def take(self) -> list[Frame]:
        """The frames, with the holds on them; the ticket is over."""
        with self._lock:
            self._over = True
            self._call = None
            frames, self._frames = self._frames, []
            return frames


class Copy:
    """A Fence: pages of the engine's pool are read or written until `done()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages = 0
        self._done = False
        self._cancelled = False
        self._call: Callable[[], None] | None = None

    @property
    def pages(self) -> int:
        """Once done. Offload: pages that are newly in host memory. Restore: leading pages whose KV is in the pool."""
        return self._pages

    def done(self) -> bool:
        return self._done

    def on_done(self, call: Callable[[], None]) -> None:
        """`call` when it is done."""
        with self._lock:
            if not self._done:
                self._call = call
                return
        call()

    def cancel(self) -> None:
        """No further page is begun; it is done soon, with what it has."""
        self._cancelled = True

    # ---- for the stack -----------------------------------------------------------------------------------------------
    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def finish(self, pages: int) -> None:
        with self._lock:
            self._pages = pages
            self._done = True
            call, self._call = self._call, None
        if call is not None:
            call()
