"""Prefix tree: which full pages of KV exist, keyed by chained page hash.

A hash names a page and everything before it, so a path needs no child maps: match is one dict lookup per page.
Invariants: a pinned node has pinned ancestors; every unpinned node is in the LRU order behind its children, so the
oldest entry is always a leaf; a hash has one page and a page one hash. All operations are O(pages named).
Does not know: page states (pages.py), requests, tokens, time: order of use is the clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId


class TreeError(BatonError):
    """A defect of ours: the tree disagrees with itself. Names the hash and the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest known prefix; `unpinned` of its pages are counted as evictable until they are pinned."""

    hashes: list[PageHash]
    pages: list[PageId]
    unpinned: int


@dataclass(slots=True, eq=False)
class _Node:
    hash: PageHash
    page: PageId
    parent: _Node | None
    children: int = 0
    pins: int = 0


class PrefixTree:
    def __init__(self) -> None:
        self._nodes: dict[PageHash, _Node] = {}
        self._idle: OrderedDict[PageHash, _Node] = OrderedDict()  # unpinned, least recently used first
        self._stored: dict[PageHash, None] = {}  # since the last drain; a dict keeps the order
        self._removed: dict[PageHash, None] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def evictable(self) -> int:
        return len(self._idle)

    def hashes(self) -> list[PageHash]:
        return list(self._nodes)

    def match(self, hashes: Sequence[PageHash]) -> Match:
        """The longest prefix of `hashes` that is here. Changes nothing, not even the order of use."""
        pages: list[PageId] = []
        unpinned = 0
        for key in hashes:
            node = self._nodes.get(key)
            if node is None:
                break
            pages.append(node.page)
            unpinned += not node.pins
        return Match(hashes=list(hashes[: len(pages)]), pages=pages, unpinned=unpinned)

    def pin(self, path: Sequence[PageHash]) -> None:
        """Keep these nodes, root first, until as many `unpin`s. A path starts at a first page."""
        for key in path:
            self._hold(self._nodes[key])

    def unpin(self, path: Sequence[PageHash]) -> None:
        """Undo one `pin`; nodes without pins become the most recently used evictable ones."""
        # Deepest first: the LRU order must hold children before their parents.
        for key in reversed(path):
            node = self._nodes[key]
            if not node.pins:
                raise TreeError(f"page {node.page} ({key.hex()}) is unpinned more often than pinned")
            node.pins -= 1
            if not node.pins:
                self._idle[key] = node

    def insert(self, parent: PageHash | None, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> list[PageId]:
        """Append a run of pages behind `parent` (pinned by the caller; None = first page) and pin each once.

        Returns the pages that the tree has for `hashes`: where one was known already, the first stays, and the caller's
        own page stays out of the tree.
        """
        above = None if parent is None else self._nodes[parent]
        kept: list[PageId] = []
        for key, page in zip(hashes, pages, strict=True):
            node = self._nodes.get(key)
            if node is None:
                node = _Node(key, page, above, pins=1)
                self._nodes[key] = node
                if above is not None:
                    above.children += 1
                self._note(key, self._removed, self._stored)
            else:
                self._hold(node)
            kept.append(node.page)
            above = node
        return kept

    def evict(self) -> PageId:
        """Forget the least recently used unpinned leaf, O(1). Raises TreeError when everything is pinned."""
        if not self._idle:
            raise TreeError("nothing to evict: every page of the tree is pinned")
        key, node = self._idle.popitem(last=False)
        if node.children:
            raise TreeError(f"page {node.page} ({key.hex()}) is evicted before its {node.children} children")
        del self._nodes[key]
        if node.parent is not None:
            node.parent.children -= 1
        self._note(key, self._stored, self._removed)
        return node.page

    def drain_events(self) -> tuple[list[PageHash], list[PageHash]]:
        """(stored, removed) since the last call, net: a hash that came and went in between is in neither."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def check(self) -> None:
        """Compare every node with its parent and the LRU order; O(nodes)."""
        children: dict[PageHash, int] = {}
        pages: set[PageId] = set()
        order = {key: index for index, key in enumerate(self._idle)}
        for key, node in self._nodes.items():
            name = f"page {node.page} ({key.hex()})"
            if node.page in pages:
                raise TreeError(f"{name}: the page has two hashes")
            pages.add(node.page)
            if (key in order) == (node.pins > 0):
                raise TreeError(f"{name}: {node.pins} pins, but in the LRU order: {key in order}")
            parent = node.parent
            if parent is None:
                continue
            if self._nodes.get(parent.hash) is not parent:
                raise TreeError(f"{name}: its parent {parent.hash.hex()} is gone")
            children[parent.hash] = children.get(parent.hash, 0) + 1
            if not parent.pins and (node.pins or order[parent.hash] < order[key]):
                raise TreeError(f"{name}: its parent would be evicted first")
        for key, node in self._nodes.items():
            if node.children != children.get(key, 0):
                raise TreeError(f"page {node.page} ({key.hex()}): counts {node.children} children")

    def _hold(self, node: _Node) -> None:
        if not node.pins:
            del self._idle[node.hash]
        node.pins += 1

    @staticmethod
    def _note(key: PageHash, undone: dict[PageHash, None], done: dict[PageHash, None]) -> None:
        if key in undone:
            del undone[key]
        else:
            done[key] = None
