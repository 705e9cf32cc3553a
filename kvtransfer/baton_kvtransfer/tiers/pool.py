"""The host pool: fixed memory in which pages lie as frames, least recently used out first.

Ranges and owners of a frame: free -> FILLING (whoever claimed it writes it) -> READY (anybody who holds it reads it) ->
free again by eviction, or DEAD (damaged: not found any more, free once nobody holds it).
Invariants: a frame that is held or FILLING never changes its owner; a READY frame that nobody holds is in the eviction
order unless a session pins its page; free + known + dead frames are all frames.
Called from every thread; each call takes one lock for a few dictionary operations per page named, and never waits for a
copy. Does not know what frames hold, except for their size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch

from baton_common.clock import Clock
from baton_common.ids import PageHash
from baton_common.memory import large_pages
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.pins import Pins, SessionId

_ALIGNMENT = 64
_LEAST_FRAMES = 4


class HostTooSmall(ValueError):
    """The memory does not hold the fewest pages that are of any use."""

    def __init__(self, host_bytes: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.least_pages = _LEAST_FRAMES
        self.least_bytes = _LEAST_FRAMES * page_bytes
        super().__init__(
            f"host_bytes is {host_bytes}, a page takes {page_bytes}; set at least {self.least_bytes}, or 0"
        )


class _State(Enum):
    FILLING = auto()
    READY = auto()
    DEAD = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Frame:
    """Memory of one page. Who got it from `claim`, `hold` or `share` gives it back with `release_all`, once."""

    page: PageHash
    view: memoryview
    index: int
    state: _State = _State.FILLING
    holds: int = 1


class HostPool:
    def __init__(
        self, host_bytes: int, *, frame_bytes: int, pinned_fraction: float, clock: Clock, metrics: TierMetrics
    ) -> None:
        """`pinned_fraction`: at most so much is kept by sessions. Raises HostTooSmall when too few frames fit.

        The memory is page-locked where there is a GPU.
        """
        self._stride = stride = -(-frame_bytes // _ALIGNMENT) * _ALIGNMENT
        count = host_bytes // stride
        if count < _LEAST_FRAMES:
            raise HostTooSmall(host_bytes, stride)
        whole = _memory(count * stride)
        self._views = [whole[index * stride : index * stride + frame_bytes] for index in range(count)]
        self._free = list(range(count - 1, -1, -1))
        self._known: dict[PageHash, Frame] = {}
        self._idle: OrderedDict[PageHash, Frame] = OrderedDict()  # first = next to go
        self._pins = Pins(int(count * pinned_fraction))
        self._frame_bytes = frame_bytes
        self._clock = clock
        self._metrics = metrics
        self._lock = threading.Lock()
        metrics.stored.labels("host").set(count * stride)
        metrics.begin("host", calls=(), reasons=("queue", "room", "copy"))

    @property
    def frames(self) -> int:
        return len(self._views)

    @property
    def bytes(self) -> int:
        """That it takes of this machine's memory."""
        return len(self._views) * self._stride

    # ---- frames ------------------------------------------------------------------------------------------------------
    def missing(self, pages: Sequence[PageHash]) -> list[PageHash]:
        """Those that are not here and not on their way; the others count as used."""
        with self._lock:
            for page in reversed(pages):
                if page in self._idle:
                    self._idle.move_to_end(page)
            return [page for page in pages if page not in self._known]

    def claim(self, page: PageHash) -> Frame | None:
        """Memory for a page that is not here; `commit` or `discard` follows. None: it is here, or there is no room."""
        with self._lock:
            if page in self._known:
                return None
            index = self._take()
            if index is None:
                return None
            frame = Frame(page=page, view=self._views[index], index=index)
            self._known[page] = frame
            return frame

    def commit(self, frame: Frame) -> None:
        """It is filled: others may hold it, and so does the caller."""
        with self._lock:
            frame.state = _State.READY

    def discard(self, frame: Frame) -> None:
        """In place of `commit`: it could not be filled."""
        self.forget(frame)
        self.release_all([frame])

    def forget(self, frame: Frame) -> None:
        """The bytes of a frame that the caller holds are damaged: nobody else will get it."""
        with self._lock:
            if frame.state is not _State.DEAD:
                frame.state = _State.DEAD
                del self._known[frame.page]

    def hold(self, pages: Sequence[PageHash]) -> list[Frame]:
        """The leading pages that are here and filled."""
        with self._lock:
            frames = []
            for page in pages:
                frame = self._known.get(page)
                if frame is None or frame.state is not _State.READY:
                    break
                self._idle.pop(page, None)
                frame.holds += 1
                frames.append(frame)
            return frames

    def share(self, frame: Frame) -> None:
        """One more hold on a frame that the caller holds."""
        with self._lock:
            frame.holds += 1

    def release_all(self, frames: Sequence[Frame]) -> None:
        """In the order of their chain: its end is of no use without its beginning, and goes first."""
        with self._lock:
            for frame in reversed(frames):
                self._let_go(frame)

    # ---- sessions ----------------------------------------------------------------------------------------------------
    def pin(self, session: SessionId, pages: Sequence[PageHash], *, ttl_s: float, quota_bytes: int) -> int:
        """See `TierStack.pin`."""
        now_s = self._clock.now()
        with self._lock:
            self._expire(now_s)
            quota_pages = quota_bytes // self._frame_bytes
            change = self._pins.pin(session, pages, expires_s=now_s + ttl_s, quota_pages=quota_pages)
            self._unpinned(change.released)
            for page in change.pinned:
                self._idle.pop(page, None)
            self._metrics.pinned.set(self._pins.pages)
            return change.held

    def unpin(self, session: SessionId) -> list[PageHash]:
        """See `TierStack.unpin`."""
        with self._lock:
            released = self._pins.unpin(session)
            self._unpinned(released)
            return released

    def demote(self, pages: Iterable[PageHash]) -> None:
        """See `TierStack.evict_soon`; of these, the last goes first."""
        with self._lock:
            for page in pages:
                if page in self._idle:
                    self._idle.move_to_end(page, last=False)

    # ---- inside the lock ---------------------------------------------------------------------------------------------
    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        self._expire(self._clock.now())
        if not self._idle:
            return None
        page, frame = self._idle.popitem(last=False)
        del self._known[page]
        frame.state = _State.DEAD
        self._metrics.evictions.labels("host").inc()
        return frame.index

    def _let_go(self, frame: Frame) -> None:
        frame.holds -= 1
        if frame.holds:
            return
        if frame.state is _State.DEAD:
            self._free.append(frame.index)
        elif not self._pins.pinned(frame.page):
            self._idle[frame.page] = frame

    def _expire(self, now_s: float) -> None:
        self._unpinned(self._pins.expire(now_s))

    def _unpinned(self, pages: Sequence[PageHash]) -> None:
        for page in reversed(pages):
            frame = self._known.get(page)
            if frame is not None and not frame.holds:
                self._idle[page] = frame
        if pages:
            self._metrics.pinned.set(self._pins.pages)


def _memory(size: int) -> memoryview:
    """Which lives as long as any part of it is in use."""
    if torch.cuda.is_available():
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
    return memoryview(large_pages(size))  # the first write to each small one would cost more than its copy
