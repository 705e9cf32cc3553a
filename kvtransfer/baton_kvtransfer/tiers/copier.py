"""Copies pages between the engine's pool and the host pool, on a lane of its own; restores go first.

Only this and the blocks that it was given touch the engine's pool. A page of the pool is read or written from the call
until its `Copy` is done, and never after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from baton_common.ids import PageHash, PageId
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.tiers.frames import FrameFormat
from baton_kvtransfer.tiers.lane import Lane
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.pool import Frame, HostPool
from baton_kvtransfer.tiers.ticket import Copy

log = logging.getLogger(__name__)


class Copier:
    def __init__(
        self,
        blocks: Blocks,
        pool: HostPool,
        frames: FrameFormat,
        *,
        most_pages: int,
        kept: Callable[[Frame], None],
        metrics: TierMetrics,
    ) -> None:
        """`most_pages` may wait in each direction. `kept`: is called with each new page of the host pool, held."""
        self._blocks = blocks
        self._pool = pool
        self._format = frames
        self._kept = kept
        self._metrics = metrics
        self._closing = False
        self._lane = Lane("pool", most_urgent=most_pages, most_others=most_pages)

    def offload(self, todo: Sequence[tuple[PageHash, PageId]]) -> Copy:
        copy = Copy()
        if not todo:
            copy.finish(0)
        elif not self._lane.later(partial(self._offload, todo, copy), len(todo)):
            self._skip("queue", len(todo))
            copy.finish(0)
        return copy

    def restore(self, todo: Sequence[tuple[Frame, PageId]]) -> Copy:
        """The frames are held by the caller, and let go here."""
        copy = Copy()
        if not todo:
            copy.finish(0)
        elif not self._lane.urgent(partial(self._restore, todo, copy), len(todo)):
            self._skip("queue", len(todo))
            self._pool.release_all([frame for frame, _ in todo])
            copy.finish(0)
        return copy

    def close(self, timeout_s: float) -> None:
        """Blocks. What has not begun is left out: its copies are done, with no pages."""
        self._closing = True
        self._lane.close(timeout_s)

    def _offload(self, todo: Sequence[tuple[PageHash, PageId]], copy: Copy) -> None:
        """host pool: free -> FILLING -> READY. All are held to the end: the first pages, without which the rest is of
        no use, must not make room for the last ones.
        """
        frames: list[Frame] = []
        try:
            for page_hash, page in todo:
                if self._closing or copy.cancelled:
                    break
                frame = self._pool.claim(page_hash)
                if frame is not None and self._gather(frame, page):
                    frames.append(frame)
                    self._kept(frame)
                elif frame is None and self._pool.missing([page_hash]):
                    self._skip("room")
                    break
        finally:
            self._pool.release_all(frames)
            copy.finish(len(frames))

    def _gather(self, frame: Frame, page: PageId) -> bool:
        key = self._format.key(frame.page)
        try:
            payload = self._format.payload(frame.view)
            digest = self._blocks.gather(self._format.page, [page], payload, self._format.seal(key))
        except Exception:
            log.exception("a page of the pool could not be read")
            self._skip("copy")
            self._pool.discard(frame)
            return False
        self._format.label(frame.view, key, digest)
        self._pool.commit(frame)
        self._metrics.bytes.labels("host", "in").inc(self._format.payload_bytes)
        return True

    def _restore(self, todo: Sequence[tuple[Frame, PageId]], copy: Copy) -> None:
        """engine's pool: pages of the caller, written until the copy is done. host pool: the frames are let go."""
        good = 0
        try:
            for frame, page in todo:
                if self._closing or copy.cancelled or not self._scatter(frame, page):
                    break
                good += 1
        finally:
            self._pool.release_all([frame for frame, _ in todo])
            copy.finish(good)

    def _scatter(self, frame: Frame, page: PageId) -> bool:
        payload, seal = self._format.payload(frame.view), self._format.seal(self._format.key(frame.page))
        digest = self._format.digest(frame.view)
        try:
            intact = self._blocks.scatter(self._format.page, [page], payload, seal, digest=digest, shared=False)
        except Exception:
            log.exception("a page of the pool could not be written")
            return False
        if not intact:
            self._metrics.damaged.labels("host").inc()
            self._pool.forget(frame)
            return False
        self._metrics.bytes.labels("host", "out").inc(self._format.payload_bytes)
        return True

    def _skip(self, reason: str, pages: int = 1) -> None:
        self._metrics.skipped.labels("host", reason).inc(pages)
