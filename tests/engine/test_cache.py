"""Ledger and tree together: what one owner's lease means for the pages of others."""

from __future__ import annotations

import pytest
from support.schedule_world import ROOT, Flag

from baton_common.hashing import page_hashes
from baton_common.ids import PageHash, RequestId
from baton_engine.kv.cache import KvCache, Lease
from baton_engine.kv.pages import LeakError

PAGE = 4


def hashes(pages: int, first: int = 0) -> list[PageHash]:
    """A chain of `pages` pages; chains with another `first` token share nothing."""
    return page_hashes(PageHash(ROOT), [first, *range(1, pages * PAGE)], PAGE)


def lease(cache: KvCache, name: str, chain: list[PageHash], pages: int) -> Lease:
    return cache.lease(RequestId(name), cache.match(chain), pages)


def fill(cache: KvCache, name: str, chain: list[PageHash]) -> Lease:
    held = lease(cache, name, chain, len(chain))
    cache.commit(held, chain)
    return held


def test_a_finished_prefix_is_shared_and_not_copied() -> None:
    cache = KvCache(8)
    first = fill(cache, "a", hashes(3))
    second = lease(cache, "b", hashes(5), 5)
    assert second.pages[:3] == first.pages
    assert cache.counts().leased == 5
    cache.check([first, second])


def test_what_two_owners_computed_at_once_is_kept_once() -> None:
    cache = KvCache(8)
    first, second = lease(cache, "a", hashes(2), 2), lease(cache, "b", hashes(3), 3)
    cache.commit(first, hashes(2))
    cache.commit(second, hashes(3))
    assert cache.match(hashes(3)).pages == [*first.pages, second.pages[2]]
    cache.release(first, [])
    cache.check([second])
    assert cache.counts().leased == 5, "the twin of the prefix holds the path of the third page"
    cache.release(second, [])
    assert (cache.counts().cached, cache.counts().free) == (3, 5)
    cache.check([])


def test_pages_that_others_computed_meanwhile_take_the_place_of_empty_ones() -> None:
    cache = KvCache(12)
    late = lease(cache, "late", hashes(5), 5)
    first = fill(cache, "first", hashes(4))
    cache.commit(late, hashes(1))
    own, theirs = list(late.pages), list(first.pages)
    cache.adopt(late, cache.match(hashes(5)))
    assert late.pages == [own[0], *theirs[1:], own[4]]
    assert cache.counts().free == 12 - 6, "late's first and last, and four of first"
    cache.check([first, late])
    cache.release(first, [])
    cache.commit(late, hashes(5))
    assert cache.match(hashes(5)).pages == [*theirs, own[4]]
    cache.release(late, [])
    assert (cache.counts().cached, cache.counts().free) == (5, 7)
    cache.check([])


def test_cached_pages_are_evicted_only_when_free_ones_run_out() -> None:
    cache = KvCache(4)
    cache.release(fill(cache, "a", hashes(2)), [])
    cache.release(lease(cache, "b", [], 2), [])
    assert cache.counts().cached == 2
    held = lease(cache, "c", [], 3)
    assert cache.match(hashes(2)).hashes == hashes(1)
    cache.check([held])


def test_a_match_that_will_be_pinned_does_not_count_as_room() -> None:
    cache = KvCache(4)
    cache.release(fill(cache, "a", hashes(3)), [])
    match = cache.match(hashes(3))
    assert cache.fits(match, 4, 0)
    assert not cache.fits(match, 5, 0)
    assert not cache.fits(match, 4, 1)


def test_growing_beyond_the_room_changes_nothing() -> None:
    cache = KvCache(4)
    held = lease(cache, "a", [], 3)
    assert not cache.grow(held, 2)
    assert len(held.pages) == 3
    assert cache.grow(held, 1)
    assert len(held.pages) == 4
    cache.check([held])


def test_fenced_cached_pages_are_not_room() -> None:
    cache = KvCache(3)
    step = Flag()
    cache.release(fill(cache, "a", hashes(2)), [step])
    assert cache.obtainable == 1
    step.up = True
    cache.retire()
    assert cache.obtainable == 3


def test_check_names_who_holds_a_page_that_nobody_leased() -> None:
    cache = KvCache(3)
    held = lease(cache, "a", [], 1)
    with pytest.raises(LeakError, match=f"page {held.pages[0]} is owned by a, held by nobody"):
        cache.check([])
