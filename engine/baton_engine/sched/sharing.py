"""The tree's side of a request: what it finds there, what it adds, and who reads those pages meanwhile.

Invariant: pages that are told (`PagesShared`) hold still from that moment until the answer's fence is done, however
late the answer comes: the hold lies on them before anybody else can ask for pages.
Does not know: rows, steps, why somebody wants to read a page.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.ids import PageHash, PageId
from baton_engine.kv.cache import KvCache
from baton_engine.kv.tree import Match
from baton_engine.sched.entry import Entry
from baton_engine.sched.records import Hold, Outcome, PagesShared


class Sharing:
    def __init__(self, cache: KvCache, page_tokens: int) -> None:
        self._cache = cache
        self._page_tokens = page_tokens
        self.tells = False  # nobody listens: nothing is noted, nothing is held
        self._hashes: list[PageHash] = []
        self._pages: list[PageId] = []
        self._holds: list[Hold] = []

    def lease(self, entry: Entry, match: Match, pages: int) -> None:
        """Admission: `match` and fresh pages up to `pages`. The whole prompt is left to compute, but for the match."""
        request = entry.request
        entry.lease = self._cache.lease(request.request_id, match, pages)
        entry.goal = len(request.tokens)
        entry.planned = entry.written = len(match.pages) * self._page_tokens
        if not request.preemptions:
            request.cached_tokens = entry.planned
            self._note(match.hashes, match.pages)

    def commit(self, entry: Entry) -> None:
        """Full pages whose KV is written become shareable."""
        if entry.lease is not None:
            hashes = entry.hash_pages(entry.written, self._page_tokens)
            known = len(entry.lease.path)
            self._note(hashes[known:], self._cache.commit(entry.lease, hashes))

    def look_again(self, entry: Entry) -> None:
        """What others computed since the admission is taken from the tree. Before the entry has a row, and while nobody
        else knows its pages."""
        request, lease = entry.request, entry.lease
        assert lease is not None, "admitted"
        match = self._cache.match(entry.hash_pages(len(request.tokens) - 1, self._page_tokens))
        known = len(lease.path)
        if len(match.pages) <= known:
            return
        self._cache.adopt(lease, match)
        entry.planned = entry.written = len(match.pages) * self._page_tokens
        if not request.preemptions:
            request.cached_tokens = entry.planned
            self._note(match.hashes[known:], match.pages[known:])

    def tell(self, outbox: list[Outcome]) -> None:
        """One outcome for everything since the last call, before any page can change hands."""
        if self._hashes:
            hold = Hold()
            self._cache.guard(self._pages, hold)
            self._holds.append(hold)
            outbox.append(PagesShared(hashes=tuple(self._hashes), pages=tuple(self._pages), hold=hold))
            self._hashes, self._pages = [], []

    def retire(self) -> None:
        self._holds = [hold for hold in self._holds if not hold.done()]

    @property
    def holding(self) -> bool:
        """Pages that could be had otherwise are being read: they come without anybody's help."""
        return bool(self._holds) and self._cache.guarded > 0

    def _note(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> None:
        if self.tells:
            self._hashes.extend(hashes)
            self._pages.extend(pages)
