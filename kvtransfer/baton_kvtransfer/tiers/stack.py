"""Storage tiers under one worker's KV pool: pages go down when they are used, and come back up when they are wanted.

The engine calls from its own thread and never waits: a call takes a few dictionary operations per page that it names
and leaves the rest to lanes: one copies between the pools, each tier has one for its I/O. Failure, slowness, damage and
lack of room all look the same from outside: less is ready.

Pages named in `offload` and `restore` hold still until `Copy.done()`. Does not know requests, prefix trees, or why a
page is wanted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from baton_common.clock import Clock
from baton_common.ids import PageHash, PageId
from baton_kvtransfer.blocks import XXH3, Blocks
from baton_kvtransfer.tiers.alarm import Alarm
from baton_kvtransfer.tiers.config import TierConfig
from baton_kvtransfer.tiers.copier import Copier
from baton_kvtransfer.tiers.frames import FrameFormat, Namespace
from baton_kvtransfer.tiers.guard import Guard
from baton_kvtransfer.tiers.ladder import Ladder, TierState
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.pins import SessionId
from baton_kvtransfer.tiers.pool import HostPool
from baton_kvtransfer.tiers.ticket import Copy, Ticket
from baton_kvtransfer.tiers.tier import Tier

_CLOSE_S = 5.0
"""For copies under way, and for what waits to be written to each tier; one that hangs is left behind."""
_WAITING = 0.5
"""Pages that wait to be written to a tier take at most this part of the host pool."""
_REMEMBERED = 4
"""Uses are counted for so many times the pages that fit into the host pool."""


class TierStack:
    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        namespace: Namespace,
        blocks: Blocks,
        config: TierConfig,
        clock: Clock,
        metrics: TierMetrics,
    ) -> None:
        """`tiers`: fastest first; they are the stack's from now on. `blocks`: of the pool whose pages are kept.

        Raises ValueError when the host pool is too small, or the blocks do not make digests of kind XXH3.
        """
        if XXH3 not in blocks.digests:
            raise ValueError(f"tiers keep digests of kind {XXH3}, the pool's blocks make {', '.join(blocks.digests)}")
        frames = FrameFormat(namespace)
        self._clock = clock
        self._metrics = metrics
        self._pool = HostPool(
            config.host_bytes,
            frame_bytes=frames.frame_bytes,
            pinned_fraction=config.pinned_fraction,
            clock=clock,
            metrics=metrics,
        )
        guards = [
            Guard(tier, frames, clock=clock, metrics=metrics, retry_s=config.retry_s, slow_s=config.slow_s)
            for tier in tiers
        ]
        self._ladder = Ladder(
            guards,
            self._pool,
            frames,
            most_reads=config.queue_pages,
            most_writes=int(self._pool.frames * _WAITING),
            metrics=metrics,
        )
        self._copier = Copier(
            blocks,
            self._pool,
            frames,
            most_pages=config.queue_pages,
            kept=self._ladder.write,
            metrics=metrics,
        )
        self._alarm = Alarm(clock)
        self._uses = _Uses(config.after_uses, most_pages=_REMEMBERED * self._pool.frames)

    def offload(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Copy:
        """The KV of these pages is complete and was used once more: keep it, if it is time to and there is room.

        Name pages in the order of their chain.
        """
        missing = {page_hash for page_hash in self._pool.missing(hashes) if self._uses.enough(page_hash)}
        pairs = zip(hashes, pages, strict=True)
        return self._copier.offload([(page_hash, page) for page_hash, page in pairs if page_hash in missing])

    def prefetch(self, hashes: Sequence[PageHash], *, deadline_s: float) -> Ticket:
        """Bring a run of pages into host memory; `deadline_s` is on the stack's clock. The caller ends the ticket."""
        here = self._pool.hold(hashes)
        self._metrics.hits.labels("host").inc(len(here))
        ticket = Ticket(hashes, here, deadline_s=deadline_s, clock=self._clock, release=self._pool.release_all)
        if len(here) < len(hashes):
            self._metrics.misses.labels("host").inc()
            self._ladder.climb(ticket)
            if not ticket.poll().over:
                self._alarm.at(deadline_s, ticket.end)
        return ticket

    def restore(self, ticket: Ticket, pages: Sequence[PageId]) -> Copy:
        """Copy the ticket's leading pages into `pages` of the pool, as many as both have. Ends the ticket."""
        frames = ticket.take()
        self._pool.release_all(frames[len(pages) :])
        return self._copier.restore(list(zip(frames, pages, strict=False)))

    def pin(self, session: SessionId, hashes: Sequence[PageHash], *, ttl_s: float, quota_bytes: int) -> int:
        """Keep the session's chain of pages in host memory for so long; those that are not there yet, once they come.

        A chain that goes on costs its new pages only; another chain takes the place of the first. `quota_bytes`: of all
        sessions of the owner. Returns how many leading pages fit into the quota and the pool.
        """
        return self._pool.pin(session, hashes, ttl_s=ttl_s, quota_bytes=quota_bytes)

    def unpin(self, session: SessionId) -> list[PageHash]:
        """Before its time; a session that is unknown or over is none. Returns the pages that nobody pins any more."""
        return self._pool.unpin(session)

    def evict_soon(self, hashes: Sequence[PageHash]) -> None:
        """A hint: these pages of the host pool make room before others do, unless they are held or pinned."""
        self._pool.demote(hashes)

    def status(self) -> list[TierState]:
        """Of the host pool and of each tier."""
        return [TierState(name="host", bytes=self._pool.bytes, reason=""), *self._ladder.status()]

    def close(self) -> None:
        """Blocks. Copies that did not begin are left out; what waits to be written to tiers is written."""
        self._alarm.close(_CLOSE_S)
        self._copier.close(_CLOSE_S)
        self._ladder.close(_CLOSE_S)


class _Uses:
    """How often pages were used that are not kept yet; remembers the latest ones."""

    def __init__(self, enough: int, *, most_pages: int) -> None:
        self._enough = enough
        self._most_pages = most_pages
        self._counts: OrderedDict[PageHash, int] = OrderedDict()

    def enough(self, page: PageHash) -> bool:
        """Counts this use."""
        count = self._counts.pop(page, 0) + 1
        if count >= self._enough:
            return True
        self._counts[page] = count
        if len(self._counts) > self._most_pages:
            self._counts.popitem(last=False)
        return False
