"""Ledger and tree together: lease, grow, commit and release the pages of one owner.

Invariants: a page is `cached` exactly when its tree node is unpinned; a lease pins its path in the tree and owns every
page of its table. Eviction happens only here, when free pages are short.
Does not know: tokens, phases of requests, why somebody wants pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.kv.pages import LeakError, PageCounts, PageLedger
from baton_engine.kv.tree import Match, PrefixTree
from baton_engine.role import Fence


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """Pages of one owner. `pages` is its page table; the first len(path) of them hold the KV that `path` names."""

    owner: RequestId
    pages: list[PageId]
    path: list[PageHash]  # pinned in the tree, root first
    twins: list[PageId] = field(default_factory=list)  # the tree's pages where ours came second


class KvCache:
    def __init__(self, total_pages: int) -> None:
        self._ledger = PageLedger(total_pages)
        self._tree = PrefixTree()

    @property
    def obtainable(self) -> int:
        """Pages that a lease can have now: free, or evictable and not fenced."""
        return self._ledger.obtainable

    @property
    def fencing(self) -> bool:
        return self._ledger.fencing

    @property
    def guarded(self) -> int:
        """Cached pages that nobody can have until a fence is done."""
        return self._ledger.fenced - self._ledger.counts().in_flight

    def counts(self) -> PageCounts:
        return self._ledger.counts()

    def hashes(self) -> list[PageHash]:
        return self._tree.hashes()

    def drain_events(self) -> tuple[list[PageHash], list[PageHash]]:
        return self._tree.drain_events()

    def match(self, hashes: Sequence[PageHash]) -> Match:
        return self._tree.match(hashes)

    def fits(self, match: Match, pages: int, spare: int) -> bool:
        """Whether a lease of `pages` that starts with `match` leaves `spare` pages obtainable."""
        return pages - len(match.pages) + spare <= self._ledger.obtainable - match.unpinned

    def lease(self, owner: RequestId, match: Match, pages: int) -> Lease:
        """A page table of `pages`; the caller asked `fits`, and `match` is still what the tree has.

        table index     before                      after
        [0, matched)    tree, cached or leased      tree, leased by owner too; path pinned
        [matched, n)    free (evicted if need be)   leased by owner, out of the tree
        """
        self._tree.pin(match.hashes)
        self._ledger.share(match.pages, owner)
        fresh = self._take(pages - len(match.pages), owner)
        return Lease(owner=owner, pages=match.pages + fresh, path=match.hashes)

    def grow(self, lease: Lease, pages: int) -> bool:
        """Append `pages` fresh pages to the table, or change nothing and return False."""
        if pages > self._ledger.obtainable:
            return False
        lease.pages.extend(self._take(pages, lease.owner))
        return True

    def commit(self, lease: Lease, hashes: Sequence[PageHash]) -> list[PageId]:
        """KV of the pages that `hashes` name (the whole chain from the first page) is written: others may share them.

        Returns the tree's pages for those hashes that were not committed before.

        table index         before                  after
        [0, committed)      in the tree, pinned     the same
        new hash            leased by owner         leased by owner, in the tree, pinned
        hash known already  leased by owner         the same, out of the tree; the tree's page becomes a twin of the
                                                    lease, so that the path below stays whole until release
        """
        done = len(lease.path)
        fresh, ours = hashes[done:], lease.pages[done : len(hashes)]
        kept = self._tree.insert(lease.path[-1] if lease.path else None, fresh, ours)
        for mine, theirs in zip(ours, kept, strict=True):
            if mine == theirs:
                self._ledger.enter_tree(mine, lease.owner)
            else:
                self._ledger.share([theirs], lease.owner)
                lease.twins.append(theirs)
        lease.path.extend(fresh)
        return kept

    def adopt(self, lease: Lease, match: Match) -> None:
        """`match` goes on where the lease's committed pages end, and nobody touches the pages behind them any more: the
        tree's take their place.

        table index             before                      after
        [0, committed)          in the tree, pinned         the same
        [committed, matched)    leased by owner             the tree's, leased by owner too; path pinned; ours are free
        [matched, n)            leased by owner             the same
        """
        done, end = len(lease.path), len(match.hashes)
        ours, theirs = lease.pages[done:end], match.pages[done:]
        self._tree.pin(match.hashes[done:])
        self._ledger.share(theirs, lease.owner)
        self._ledger.release(ours, lease.owner)
        lease.pages[done:end] = theirs
        lease.path.extend(match.hashes[done:])

    def guard(self, pages: Sequence[PageId], fence: Fence) -> None:
        """Somebody reads these pages, leased or cached, until `fence` is done: they are not given to anybody else."""
        self._ledger.guard(pages, fence)

    def release(self, lease: Lease, fences: Iterable[Fence]) -> None:
        """The owner lets go of everything.

        page                before                  after
        in the tree         leased, pinned          cached unless others own it; its fences go with it
        out of the tree     leased by owner         in flight until the fences are done, then free
        """
        self._tree.unpin(lease.path)
        fences = list(fences)
        self._ledger.release(lease.pages, lease.owner, fences)
        self._ledger.release(lease.twins, lease.owner)
        lease.pages, lease.path, lease.twins = [], [], []

    def retire(self) -> None:
        self._ledger.retire()

    def check(self, leases: Iterable[Lease]) -> None:
        """Raise LeakError or TreeError unless ledger, tree and exactly these leases agree. O(pages)."""
        self._ledger.check()
        self._tree.check()
        held: dict[PageId, list[RequestId]] = {}
        for lease in leases:
            for page in (*lease.pages, *lease.twins):
                held.setdefault(page, []).append(lease.owner)
        counts = self._ledger.counts()
        for page in map(PageId, range(counts.total)):
            owners = self._ledger.owners(page)
            if sorted(owners) != sorted(held.get(page, [])):
                wanted = ", ".join(held.get(page, [])) or "nobody"
                raise LeakError(f"page {page} is owned by {', '.join(owners) or 'nobody'}, held by {wanted}")
        known = self._tree.match(self._tree.hashes()).pages
        astray = [page for page in known if not self._ledger.in_tree(page)]
        if astray:
            raise LeakError(f"page {astray[0]} is in the tree, the ledger does not know")
        if self._tree.evictable != counts.cached:
            raise LeakError(f"the tree could evict {self._tree.evictable} pages, {counts.cached} are cached")

    def _take(self, count: int, owner: RequestId) -> list[PageId]:
        while self._ledger.free < count:
            self._ledger.leave_tree(self._tree.evict())
        return self._ledger.lease(count, owner)
