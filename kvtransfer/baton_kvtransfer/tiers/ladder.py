"""The tiers below the host pool, fastest first, each with its lane: pages are written down to them and climb back up.

A run of pages is asked for tier by tier: each continues it as far as it can, then the next one goes on from there, and
so round, until the run is complete, its ticket is over, or no tier knew the next page. Pages that a lower tier gave are
written to the tiers above it, too.
Every page here is a frame of the host pool, held by the job that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from baton_common.ids import PageHash
from baton_kvtransfer.tiers.frames import FrameFormat
from baton_kvtransfer.tiers.guard import Guard
from baton_kvtransfer.tiers.lane import Lane
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.pool import Frame, HostPool
from baton_kvtransfer.tiers.ticket import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    name: str
    bytes: int  # that it takes of this machine's disk or memory
    reason: str  # why it is off, wholly or in part; empty = it is on


class Ladder:
    def __init__(
        self,
        guards: Sequence[Guard],
        pool: HostPool,
        frames: FrameFormat,
        *,
        most_reads: int,
        most_writes: int,
        metrics: TierMetrics,
    ) -> None:
        """`most_reads`: tickets that may wait for a tier. `most_writes`: pages that may; they take room meanwhile."""
        self._pool = pool
        self._format = frames
        self._metrics = metrics
        self._steps = [
            (
                guard,
                Lane(guard.name, most_urgent=most_reads, most_others=most_writes, first=guard.open, last=guard.close),
            )
            for guard in guards
        ]

    def write(self, frame: Frame, *, above: int | None = None) -> None:
        """Into every tier, or the first `above`; the caller holds the frame during the call only."""
        for guard, lane in self._steps[:above]:
            self._pool.share(frame)
            if not lane.later(partial(self._put, guard, frame)):
                self._metrics.skipped.labels(guard.name, "queue").inc()
                self._pool.release_all([frame])

    def climb(self, ticket: Ticket) -> None:
        """Bring the rest of the ticket's pages into the host pool; the ticket is ended when nothing more comes."""
        self._ask(ticket, step=0, fruitless=0)

    def status(self) -> list[TierState]:
        return [TierState(name=guard.name, bytes=guard.bytes, reason=guard.reason) for guard, _ in self._steps]

    def close(self, timeout_s: float) -> None:
        """Blocks, so long for each tier."""
        for _, lane in self._steps:
            lane.close(timeout_s)

    def _put(self, guard: Guard, frame: Frame) -> None:
        guard.put(self._format.key(frame.page), frame.view)
        self._pool.release_all([frame])

    def _ask(self, ticket: Ticket, *, step: int, fruitless: int) -> None:
        while fruitless < len(self._steps):
            guard, lane = self._steps[step]
            if not guard.hangs and lane.urgent(partial(self._continue, ticket, step, fruitless)):
                return
            step = (step + 1) % len(self._steps)
            fruitless += 1
        ticket.end()

    def _continue(self, ticket: Ticket, step: int, fruitless: int) -> None:
        """On the lane of that step."""
        guard, _ = self._steps[step]
        begin = ticket.poll().ready
        rest = ticket.pages[begin:]
        found = 0 if ticket.poll().over else guard.has([self._format.key(page) for page in rest])
        for page in rest[:found]:
            frames = self._pool.hold([page]) or self._read(guard, step, page)
            if not frames:
                break
            if not ticket.add(frames):
                self._pool.release_all(frames)
                break
        progress = ticket.poll()
        if not progress.over:
            self._metrics.misses.labels(guard.name).inc()
            fruitless = 0 if progress.ready > begin else fruitless
            self._ask(ticket, step=(step + 1) % len(self._steps), fruitless=fruitless + 1)

    def _read(self, guard: Guard, step: int, page: PageHash) -> list[Frame]:
        """host pool: free -> FILLING -> READY, held for the ticket; or free again."""
        frame = self._pool.claim(page)
        if frame is None:
            return []
        if not guard.get(self._format.key(page), frame.view):
            self._pool.discard(frame)
            return []
        self._pool.commit(frame)
        self.write(frame, above=step)
        return [frame]
