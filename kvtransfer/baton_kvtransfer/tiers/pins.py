"""Which pages sessions keep from eviction: a pure ledger, by page hash, of pages that may or may not be in memory.

A session is a chain of pages that grows turn by turn; pinning a grown chain costs its new pages only. Invariants: an
owner's pages, each counted once however many of its sessions share it, never exceed the quota of its latest call, and
all pages together never exceed the capacity; what does not fit stays unpinned, from the end of the chain.
Does not know frames, threads or bytes in memory.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from baton_common.ids import PageHash


@dataclass(frozen=True, slots=True)
class SessionId:
    """Sessions of different owners never meet, whatever their names."""

    owner: str  # tenant whose quota it takes
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PinChange:
    """What one call changed. A page may be in both lists: it is pinned."""

    released: list[PageHash]
    pinned: list[PageHash]
    held: int  # leading pages of the chain that are pinned now


@dataclass(slots=True)
class _Session:
    expires_s: float
    chain: list[PageHash] = field(default_factory=list)


class Pins:
    def __init__(self, capacity_pages: int) -> None:
        self._capacity = capacity_pages
        self._sessions: dict[SessionId, _Session] = {}
        self._expiry: list[tuple[float, str, str]] = []
        self._due: dict[SessionId, float] = {}  # its entry in `_expiry` that counts: never later than its end
        self._owned: dict[str, dict[PageHash, int]] = defaultdict(dict)  # owner -> page -> its sessions
        self._owners: dict[PageHash, int] = {}

    @property
    def pages(self) -> int:
        return len(self._owners)

    def pinned(self, page: PageHash) -> bool:
        return page in self._owners

    def owned(self, owner: str) -> int:
        """Pages that count against the owner's quota."""
        return len(self._owned[owner]) if owner in self._owned else 0

    def pin(self, session: SessionId, chain: Sequence[PageHash], *, expires_s: float, quota_pages: int) -> PinChange:
        """Pin the chain from its first page, as far as it fits, in place of what the session had."""
        state = self._sessions.get(session)
        released: list[PageHash] = []
        if state is not None and not _continues(state.chain, chain):
            released = self.unpin(session)
            state = None
        if state is None:
            state = self._sessions[session] = _Session(expires_s)
        state.expires_s = expires_s
        if expires_s < self._due.get(session, inf):
            self._remind(session, expires_s)
        pinned: list[PageHash] = []
        mine = self._owned[session.owner]
        for page in chain[len(state.chain) :]:
            if page not in mine:
                if len(mine) >= quota_pages or (page not in self._owners and len(self._owners) >= self._capacity):
                    break
                mine[page] = 0
                self._owners[page] = self._owners.get(page, 0) + 1
                pinned.append(page)
            mine[page] += 1
            state.chain.append(page)
        return PinChange(released=released, pinned=pinned, held=len(state.chain))

    def unpin(self, session: SessionId) -> list[PageHash]:
        """Forget the session. Returns the pages that nobody pins any more."""
        state = self._sessions.pop(session, None)
        if state is None:
            return []
        mine = self._owned[session.owner]
        released: list[PageHash] = []
        for page in state.chain:
            mine[page] -= 1
            if mine[page]:
                continue
            del mine[page]
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                released.append(page)
        if not mine:
            del self._owned[session.owner]
        return released

    def expire(self, now_s: float) -> list[PageHash]:
        """Unpin every session whose time is over; O(1) when there is none."""
        released: list[PageHash] = []
        while self._expiry and self._expiry[0][0] <= now_s:
            due_s, owner, name = heapq.heappop(self._expiry)
            session = SessionId(owner, name)
            if self._due.get(session) != due_s:
                continue
            del self._due[session]
            state = self._sessions.get(session)
            if state is not None and state.expires_s > now_s:
                self._remind(session, state.expires_s)
            else:
                released += self.unpin(session)
        return released

    def _remind(self, session: SessionId, due_s: float) -> None:
        self._due[session] = due_s
        heapq.heappush(self._expiry, (due_s, session.owner, session.name))


def _continues(known: Sequence[PageHash], chain: Sequence[PageHash]) -> bool:
    """A hash names all pages before it, so the last known one stands for all."""
    return not known or (len(known) <= len(chain) and chain[len(known) - 1] == known[-1])
