"""Prefix tree: longest prefix match, least recently used leaves go first, events tell the net change."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton_common.ids import PageHash, PageId
from baton_engine.kv.tree import PrefixTree, TreeError


def path(text: str) -> list[PageHash]:
    """'abc' -> names of the three pages a, ab, abc: each covers everything before it, as chained hashes do."""
    return [PageHash(text[: end + 1].encode()) for end in range(len(text))]


def put(tree: PrefixTree, text: str, first_page: int) -> list[PageId]:
    """Insert all pages of `text` as one request would, then let go of them."""
    pages = [PageId(first_page + index) for index in range(len(text))]
    kept = tree.insert(None, path(text), pages)
    tree.unpin(path(text))
    return kept


def test_match_returns_the_longest_known_prefix() -> None:
    tree = PrefixTree()
    put(tree, "abc", 10)
    match = tree.match(path("abxy"))
    assert match.pages == [10, 11]
    assert match.hashes == path("ab")
    assert match.unpinned == 2
    assert tree.match(path("x")).pages == []


def test_a_second_page_for_a_known_hash_is_not_taken() -> None:
    tree = PrefixTree()
    put(tree, "ab", 10)
    assert put(tree, "abc", 20) == [10, 11, 22]
    assert tree.match(path("abc")).pages == [10, 11, 22]


def test_eviction_takes_leaves_before_parents_and_the_oldest_path_first() -> None:
    tree = PrefixTree()
    put(tree, "abc", 10)
    put(tree, "xy", 20)
    assert [tree.evict() for _ in range(5)] == [12, 11, 10, 21, 20]
    with pytest.raises(TreeError, match="nothing to evict"):
        tree.evict()


def test_use_moves_a_path_to_the_end_of_the_order() -> None:
    tree = PrefixTree()
    put(tree, "abc", 10)
    put(tree, "xy", 20)
    tree.pin(path("ab"))
    tree.unpin(path("ab"))
    assert [tree.evict() for _ in range(5)] == [12, 21, 20, 11, 10]


def test_looking_up_does_not_count_as_use() -> None:
    tree = PrefixTree()
    put(tree, "a", 10)
    put(tree, "x", 20)
    tree.match(path("a"))
    assert tree.evict() == 10


def test_pinned_pages_are_never_evicted() -> None:
    tree = PrefixTree()
    put(tree, "abc", 10)
    tree.pin(path("ab"))
    assert tree.evictable == 1
    assert tree.evict() == 12
    with pytest.raises(TreeError, match="pinned"):
        tree.evict()


def test_a_page_inserted_behind_anothers_prefix_keeps_that_prefix() -> None:
    tree = PrefixTree()
    put(tree, "ab", 10)
    tree.insert(None, path("abc"), [PageId(20), PageId(21), PageId(22)])
    assert tree.evictable == 0
    tree.unpin(path("abc"))
    assert [tree.evict() for _ in range(3)] == [22, 11, 10]


def test_unpinning_more_than_was_pinned_is_an_error() -> None:
    tree = PrefixTree()
    put(tree, "a", 10)
    with pytest.raises(TreeError, match=r"page 10 .* unpinned more often"):
        tree.unpin(path("a"))


def test_events_are_the_net_change() -> None:
    tree = PrefixTree()
    put(tree, "ab", 10)
    assert tree.drain_events() == (path("ab"), [])
    assert tree.drain_events() == ([], [])
    tree.evict()
    put(tree, "ab", 10)  # "ab" went and came back, nothing to tell
    put(tree, "x", 20)
    for _ in range(3):
        tree.evict()
    assert tree.drain_events() == ([], [path("ab")[1], path("ab")[0]])


def test_check_finds_a_lost_parent() -> None:
    tree = PrefixTree()
    put(tree, "abc", 10)
    del tree._nodes[path("ab")[1]]
    with pytest.raises(TreeError, match=r"page 12 .* parent .* is gone"):
        tree.check()


TEXTS = st.text("ab", min_size=1, max_size=5)


class TreeMachine(RuleBasedStateMachine):
    """Against a dictionary of pages, a list of pinned paths and a list of last uses."""

    @initialize()
    def start(self) -> None:
        self.tree = PrefixTree()
        self.pages: dict[PageHash, PageId] = {}
        self.pinned: list[str] = []
        self.used: list[PageHash] = []  # unpinned ones, least recently used first
        self.mirror: set[PageHash] = set()
        self.next_page = 0

    def is_pinned(self, key: PageHash) -> bool:
        return any(key in path(text) for text in self.pinned)

    def settle(self) -> None:
        self.used = [key for key in self.used if not self.is_pinned(key)]

    @rule(text=TEXTS)
    def insert(self, text: str) -> None:
        fresh = [PageId(self.next_page + index) for index in range(len(text))]
        self.next_page += len(text)
        for key, page in zip(path(text), fresh, strict=True):
            self.pages.setdefault(key, page)
        assert self.tree.insert(None, path(text), fresh) == [self.pages[key] for key in path(text)]
        self.pinned.append(text)
        self.settle()

    @rule(text=TEXTS, length=st.integers(0, 4))
    def extend_a_pinned_path(self, text: str, length: int) -> None:
        if not self.pinned:
            return
        base = self.pinned.pop(length % len(self.pinned))
        fresh = [PageId(self.next_page + index) for index in range(len(text))]
        self.next_page += len(text)
        tail = path(base + text)[len(base) :]
        for key, page in zip(tail, fresh, strict=True):
            self.pages.setdefault(key, page)
        assert self.tree.insert(path(base)[-1], tail, fresh) == [self.pages[key] for key in tail]
        self.pinned.append(base + text)
        self.settle()

    @rule(text=TEXTS)
    def match_and_pin(self, text: str) -> None:
        known = next((end for end in range(len(text)) if path(text)[end] not in self.pages), len(text))
        match = self.tree.match(path(text))
        assert match.hashes == path(text[:known])
        assert match.pages == [self.pages[key] for key in match.hashes]
        assert match.unpinned == sum(not self.is_pinned(key) for key in match.hashes)
        if known:
            self.tree.pin(match.hashes)
            self.pinned.append(text[:known])
            self.settle()

    @precondition(lambda self: self.pinned)
    @rule(index=st.integers(0, 9))
    def unpin(self, index: int) -> None:
        text = self.pinned.pop(index % len(self.pinned))
        self.tree.unpin(path(text))
        self.used.extend(key for key in reversed(path(text)) if not self.is_pinned(key))

    @precondition(lambda self: self.used)
    @rule()
    def evict(self) -> None:
        key = self.used.pop(0)
        assert not any(other != key and other.startswith(key) for other in self.pages), "not a leaf"
        assert self.tree.evict() == self.pages.pop(key)

    @rule()
    def drain(self) -> None:
        stored, removed = self.tree.drain_events()
        assert not set(stored) & (set(removed) | self.mirror)
        assert set(removed) <= self.mirror
        self.mirror = (self.mirror | set(stored)) - set(removed)
        assert self.mirror == set(self.pages)

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert set(self.tree.hashes()) == set(self.pages)
        assert self.tree.evictable == len(self.used)


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
