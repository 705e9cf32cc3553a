"""Page accounting: who owns each page of the pool, and which fences still hold it back.

States of a page: free; cached (in the prefix tree, no owner); leased (owners, in the tree or not); in flight (no owner,
not in the tree, a fence is not done). Invariant: free + cached + leased + in_flight == total.
A page becomes free only with no owner, out of the tree, and every fence on it done.
Does not know: tensors, hashes, requests beyond their id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId
from baton_engine.role import Fence


class LeakError(BatonError):
    """A defect of ours: a page is owned, freed or counted twice, or by nobody. Names the page and the owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """How many pages are in each state."""

    free: int
    cached: int
    leased: int
    in_flight: int
    total: int


class PageLedger:
    """All operations are O(pages named). Violations raise LeakError before anything is changed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free: list[PageId] = [PageId(page) for page in range(total - 1, -1, -1)]
        self._owners: list[list[RequestId]] = [[] for _ in range(total)]
        self._in_tree = bytearray(total)
        self._fenced = [0] * total  # fences on the page that are not done
        self._fences: dict[int, tuple[Fence, list[PageId]]] = {}  # by identity: one poll per fence, not per page
        self._cached = 0
        self._cached_fenced = 0
        self._in_flight = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def obtainable(self) -> int:
        """Pages that are free, or become free the moment the tree drops them."""
        return len(self._free) + self._cached - self._cached_fenced

    @property
    def fenced(self) -> int:
        """Unowned pages that become free or evictable when their fences are done."""
        return self._in_flight + self._cached_fenced

    @property
    def fencing(self) -> bool:
        """True while any fence is polled."""
        return bool(self._fences)

    def counts(self) -> PageCounts:
        leased = self._total - len(self._free) - self._cached - self._in_flight
        return PageCounts(
            free=len(self._free), cached=self._cached, leased=leased, in_flight=self._in_flight, total=self._total
        )

    def owners(self, page: PageId) -> tuple[RequestId, ...]:
        return tuple(self._owners[page])

    def in_tree(self, page: PageId) -> bool:
        return bool(self._in_tree[page])

    def lease(self, count: int, owner: RequestId) -> list[PageId]:
        """Free pages -> leased by `owner`. The caller made sure that there are enough."""
        if count > len(self._free):
            raise LeakError(f"{owner} wants {count} pages, {len(self._free)} are free", request_id=owner)
        if not count:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._owners[page].append(owner)
        return pages

    def share(self, pages: Sequence[PageId], owner: RequestId) -> None:
        """Pages of the tree (cached or leased) get one more owner."""
        for page in pages:
            if not self._in_tree[page]:
                raise LeakError(f"page {page} is not in the tree, {owner} cannot share it", request_id=owner)
        for page in pages:
            if not self._owners[page]:
                self._cached -= 1
                self._cached_fenced -= self._fenced[page] > 0
            self._owners[page].append(owner)

    def release(self, pages: Sequence[PageId], owner: RequestId, fences: Iterable[Fence] = ()) -> None:
        """`owner` lets go; whatever may still touch the pages is named by `fences`.

        leased -> leased (other owners) | cached (in the tree) | in flight (a fence is not done) | free
        """
        for page in pages:
            if owner not in self._owners[page]:
                raise LeakError(f"{owner} releases page {page}, owned by {self._who(page)}", request_id=owner)
        for fence in fences:
            self._attach(fence, pages)
        for page in pages:
            self._owners[page].remove(owner)
            if self._owners[page]:
                continue
            if self._in_tree[page]:
                self._cached += 1
                self._cached_fenced += self._fenced[page] > 0
            else:
                self._settle(page)

    def guard(self, pages: Sequence[PageId], fence: Fence) -> None:
        """Pages that are leased or cached get one more fence: without an owner they cannot be had until it is done."""
        for page in pages:
            if not (self._owners[page] or self._in_tree[page]):
                raise LeakError(f"page {page} is guarded, but nobody's: not leased, not in the tree")
        self._attach(fence, pages)

    def enter_tree(self, page: PageId, owner: RequestId) -> None:
        """A leased page becomes part of the prefix tree; its owner keeps it."""
        if owner not in self._owners[page] or self._in_tree[page]:
            raise LeakError(f"{owner} puts page {page} into the tree, owned by {self._who(page)}", request_id=owner)
        self._in_tree[page] = 1

    def leave_tree(self, page: PageId) -> None:
        """cached -> free | in flight. A page that a request owns cannot leave."""
        if self._owners[page] or not self._in_tree[page]:
            raise LeakError(f"page {page} leaves the tree, owned by {self._who(page)}")
        self._in_tree[page] = 0
        self._cached -= 1
        self._cached_fenced -= self._fenced[page] > 0
        self._settle(page)

    def retire(self) -> None:
        """Poll each fence once; pages whose last fence is done become free (or evictable)."""
        done = [key for key, (fence, _) in self._fences.items() if fence.done()]
        for key in done:
            for page in self._fences.pop(key)[1]:
                self._fenced[page] -= 1
                if self._fenced[page] or self._owners[page]:
                    continue
                if self._in_tree[page]:
                    self._cached_fenced -= 1
                else:
                    self._in_flight -= 1
                    self._free.append(page)

    def check(self) -> None:
        """Recount everything from scratch; O(total). Raises LeakError naming page and owner."""
        free = set(self._free)
        if len(free) != len(self._free):
            twice = next(page for page in free if self._free.count(page) > 1)
            raise LeakError(f"page {twice} is free twice, owned by {self._who(twice)}")
        pending = [0] * self._total
        for _, pages in self._fences.values():
            for page in pages:
                pending[page] += 1
        cached = cached_fenced = leased = in_flight = 0
        for page in map(PageId, range(self._total)):
            owned, tree, fenced = bool(self._owners[page]), bool(self._in_tree[page]), self._fenced[page]
            if fenced != pending[page]:
                raise LeakError(f"page {page} counts {fenced} fences, has {pending[page]}; owned by {self._who(page)}")
            if page in free:
                if owned or tree or fenced:
                    raise LeakError(f"page {page} is free but owned by {self._who(page)}, {fenced} fences on it")
            elif owned:
                leased += 1
            elif tree:
                cached += 1
                cached_fenced += fenced > 0
            elif fenced:
                in_flight += 1
            else:
                raise LeakError(f"page {page} leaked: not free, no owner, not in the tree, no fence")
        found = (cached, cached_fenced, leased, in_flight)
        counted = self.counts()
        if found != (counted.cached, self._cached_fenced, counted.leased, counted.in_flight):
            raise LeakError(f"found (cached, fenced, leased, in flight) {found}, counted {counted}")

    def _attach(self, fence: Fence, pages: Sequence[PageId]) -> None:
        if fence.done():
            return
        _, held = self._fences.setdefault(id(fence), (fence, []))
        held.extend(pages)
        for page in pages:
            if not (self._fenced[page] or self._owners[page]):
                self._cached_fenced += 1
            self._fenced[page] += 1

    def _settle(self, page: PageId) -> None:
        if self._fenced[page]:
            self._in_flight += 1
        else:
            self._free.append(page)

    def _who(self, page: PageId) -> str:
        names = ", ".join(self._owners[page]) or "nobody"
        return f"{names} and the tree" if self._in_tree[page] else names
