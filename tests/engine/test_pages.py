"""Page ledger: every page has one state, and comes back only after its fences."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.schedule_world import Flag

from baton_common.ids import PageId, RequestId
from baton_engine.kv.pages import LeakError, PageCounts, PageLedger

A, B = RequestId("a"), RequestId("b")


def counts(free: int = 0, cached: int = 0, leased: int = 0, in_flight: int = 0) -> PageCounts:
    total = free + cached + leased + in_flight
    return PageCounts(free=free, cached=cached, leased=leased, in_flight=in_flight, total=total)


def test_leased_pages_are_distinct_and_counted() -> None:
    ledger = PageLedger(5)
    pages = [*ledger.lease(2, A), *ledger.lease(1, B)]
    assert len(set(pages)) == 3
    assert ledger.counts() == counts(free=2, leased=3)
    assert ledger.owners(pages[2]) == (B,)


def test_a_released_page_without_fences_is_free_at_once() -> None:
    ledger = PageLedger(2)
    ledger.release(ledger.lease(2, A), A)
    assert ledger.counts() == counts(free=2)


def test_a_released_page_stays_in_flight_until_every_fence_on_it_is_done() -> None:
    ledger = PageLedger(1)
    step, scatter = Flag(), Flag()
    ledger.release(ledger.lease(1, A), A, [step, scatter])
    step.up = True
    ledger.retire()
    assert ledger.counts() == counts(in_flight=1)
    assert ledger.obtainable == 0
    scatter.up = True
    ledger.retire()
    assert ledger.counts() == counts(free=1)
    assert not ledger.fencing


def test_a_shared_page_stays_leased_until_its_last_owner_lets_go() -> None:
    ledger = PageLedger(1)
    (page,) = ledger.lease(1, A)
    ledger.enter_tree(page, A)
    ledger.share([page], B)
    ledger.release([page], A)
    assert ledger.counts() == counts(leased=1)
    ledger.release([page], B)
    assert ledger.counts() == counts(cached=1)


def test_a_fence_outlives_the_tree() -> None:
    """A step may still read a cached page when it is evicted: it must not be written by somebody else yet."""
    ledger = PageLedger(1)
    (page,) = ledger.lease(1, A)
    ledger.enter_tree(page, A)
    step = Flag()
    ledger.release([page], A, [step])
    assert ledger.counts() == counts(cached=1)
    assert ledger.obtainable == 0
    ledger.leave_tree(page)
    assert ledger.counts() == counts(in_flight=1)
    step.up = True
    ledger.retire()
    assert ledger.counts() == counts(free=1)


def test_a_cached_page_becomes_obtainable_when_its_fence_is_done() -> None:
    ledger = PageLedger(1)
    (page,) = ledger.lease(1, A)
    ledger.enter_tree(page, A)
    step = Flag()
    ledger.release([page], A, [step])
    step.up = True
    ledger.retire()
    assert ledger.obtainable == 1
    assert ledger.counts() == counts(cached=1)


def test_each_fence_is_polled_once_per_retire_however_many_pages_wait_for_it() -> None:
    class Counting(Flag):
        polls = 0

        def done(self) -> bool:
            self.polls += 1
            return False

    ledger = PageLedger(8)
    fence = Counting()
    for owner in (A, B):
        ledger.release(ledger.lease(4, owner), owner, [fence])
    fence.polls = 0
    ledger.retire()
    assert fence.polls == 1


def test_a_guarded_page_of_the_tree_is_nobodys_until_its_fence_is_done() -> None:
    ledger, fence = PageLedger(2), Flag()
    cached, leased = ledger.lease(2, A)
    for page in (cached, leased):
        ledger.enter_tree(page, A)
    ledger.release([cached], A)
    ledger.guard([cached, leased, cached], fence)
    assert (ledger.counts(), ledger.obtainable) == (counts(0, 1, 1, 0), 0)
    ledger.release([leased], A)
    ledger.leave_tree(cached)
    assert (ledger.counts(), ledger.obtainable) == (counts(0, 1, 0, 1), 0), "evicted, but not free"
    ledger.check()
    fence.up = True
    ledger.retire()
    assert (ledger.counts(), ledger.obtainable) == (counts(1, 1, 0, 0), 2)
    ledger.check()


def test_a_free_page_cannot_be_guarded() -> None:
    ledger = PageLedger(2)
    (page,) = ledger.lease(1, A)
    with pytest.raises(LeakError, match="page 1 is guarded, but nobody's"):
        ledger.guard([page, PageId(1 - page)], Flag())
    ledger.check()
    assert ledger.counts() == counts(1, 0, 1, 0)


def test_violations_name_page_and_owner_and_change_nothing() -> None:
    ledger = PageLedger(2)
    (page,) = ledger.lease(1, A)
    before = ledger.counts()
    with pytest.raises(LeakError, match=f"b releases page {page}, owned by a"):
        ledger.release([page], B)
    with pytest.raises(LeakError, match=f"page {page} is not in the tree, b cannot share it"):
        ledger.share([page], B)
    with pytest.raises(LeakError, match="b wants 2 pages, 1 are free"):
        ledger.lease(2, B)
    with pytest.raises(LeakError, match=f"b puts page {page} into the tree, owned by a"):
        ledger.enter_tree(page, B)
    ledger.enter_tree(page, A)
    with pytest.raises(LeakError, match=f"page {page} leaves the tree, owned by a and the tree"):
        ledger.leave_tree(page)
    assert ledger.counts() == before
    ledger.check()


def test_check_finds_a_lost_page() -> None:
    ledger = PageLedger(3)
    ledger._free.pop()
    with pytest.raises(LeakError, match="page 0 leaked"):
        ledger.check()


def test_check_finds_a_page_that_is_free_and_owned() -> None:
    ledger = PageLedger(3)
    (page,) = ledger.lease(1, A)
    ledger._free.append(page)
    with pytest.raises(LeakError, match=f"page {page} is free but owned by a"):
        ledger.check()


class LedgerMachine(RuleBasedStateMachine):
    """Against a model that keeps, per page, its owners, whether it is in the tree, and its open fences."""

    TOTAL = 6
    OWNERS = (A, B, RequestId("c"))

    @initialize()
    def start(self) -> None:
        self.ledger = PageLedger(self.TOTAL)
        self.owners: dict[PageId, list[RequestId]] = {PageId(page): [] for page in range(self.TOTAL)}
        self.tree: set[PageId] = set()
        self.fences: list[tuple[Flag, set[PageId]]] = []

    def fenced(self, page: PageId) -> bool:
        return any(page in pages for _, pages in self.fences)

    def free(self) -> set[PageId]:
        return {p for p, owners in self.owners.items() if not owners and p not in self.tree and not self.fenced(p)}

    @rule(count=st.integers(0, 3), owner=st.sampled_from(OWNERS))
    def lease(self, count: int, owner: RequestId) -> None:
        if count > len(self.free()):
            with pytest.raises(LeakError):
                self.ledger.lease(count, owner)
            return
        for page in self.ledger.lease(count, owner):
            assert page in self.free(), "a page was handed out that something may still touch"
            self.owners[page].append(owner)

    @rule(page=st.integers(0, TOTAL - 1).map(PageId), owner=st.sampled_from(OWNERS))
    def share(self, page: PageId, owner: RequestId) -> None:
        if page in self.tree and owner not in self.owners[page]:
            self.ledger.share([page], owner)
            self.owners[page].append(owner)

    @rule(page=st.integers(0, TOTAL - 1).map(PageId))
    def enter_tree(self, page: PageId) -> None:
        if self.owners[page] and page not in self.tree:
            self.ledger.enter_tree(page, self.owners[page][0])
            self.tree.add(page)

    @rule(page=st.integers(0, TOTAL - 1).map(PageId))
    def leave_tree(self, page: PageId) -> None:
        if page in self.tree and not self.owners[page]:
            self.ledger.leave_tree(page)
            self.tree.discard(page)

    @rule(owner=st.sampled_from(OWNERS), fences=st.integers(0, 2))
    def release(self, owner: RequestId, fences: int) -> None:
        pages = [page for page, owners in self.owners.items() if owner in owners]
        flags = [Flag() for _ in range(fences)]
        self.ledger.release(pages, owner, flags)
        for page in pages:
            self.owners[page].remove(owner)
        self.fences.extend((flag, set(pages)) for flag in flags)

    @rule(pages=st.lists(st.integers(0, TOTAL - 1).map(PageId), min_size=1, max_size=4))
    def guard(self, pages: list[PageId]) -> None:
        flag = Flag()
        if not all(self.owners[page] or page in self.tree for page in pages):
            with pytest.raises(LeakError):
                self.ledger.guard(pages, flag)
            return
        self.ledger.guard(pages, flag)
        self.fences.append((flag, set(pages)))

    @precondition(lambda self: self.fences)
    @rule(data=st.data())
    def complete_a_fence(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.fences) - 1))
        self.fences.pop(index)[0].up = True
        self.ledger.retire()

    @invariant()
    def counts_agree(self) -> None:
        self.ledger.check()
        leased = {page for page, owners in self.owners.items() if owners}
        cached = self.tree - leased
        flying = {page for page in self.owners if page not in leased | cached and self.fenced(page)}
        free = len(self.free())
        assert self.ledger.counts() == counts(free, len(cached), len(leased), len(flying))
        assert self.ledger.obtainable == free + sum(not self.fenced(page) for page in cached)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
