"""Who reads pages of the prefix tree while requests come and go: the test's storage tier.

Every page that is told must hold the KV that its hash names, and must still hold it when the reader ends, however late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from baton_common.hashing import page_hashes, salted_root
from baton_common.ids import PageHash, PageId
from baton_engine.request import Request

Slots = dict[tuple[PageId, int], int]


@dataclass
class Reading:
    """A fence that is done when the last page is copied."""

    slots: Slots
    over: bool = False

    def done(self) -> bool:
        return self.over


@dataclass
class Readers:
    """`kv` is the device's; `values` gives the KV of a token sequence, position by position."""

    root: PageHash
    page_tokens: int
    kv: Slots
    values: Callable[[Sequence[int]], list[int]]
    open: list[Reading] = field(default_factory=list)
    told: list[PageHash] = field(default_factory=list)

    def tell(self, hashes: Sequence[PageHash], pages: Sequence[PageId], requests: Iterable[Request]) -> Reading:
        """Begin to read; the pages must be right by now."""
        assert len(hashes) == len(pages) > 0
        truth = self._truth(requests)
        reading = Reading({})
        for key, page in zip(hashes, pages, strict=True):
            slots = {(page, offset): self.kv.get((page, offset)) for offset in range(self.page_tokens)}
            assert list(slots.values()) == truth[key], f"page {page} was told under a foreign hash"
            reading.slots.update(dict(zip(slots, truth[key], strict=True)))
        self.told += hashes
        self.open.append(reading)
        return reading

    def finish(self, index: int) -> None:
        reading = self.open.pop(index)
        for slot, value in reading.slots.items():
            assert self.kv[slot] == value, f"page {slot[0]} changed under a reader"
        reading.over = True

    def _truth(self, requests: Iterable[Request]) -> dict[PageHash, list[int]]:
        truth: dict[PageHash, list[int]] = {}
        for request in requests:
            values = self.values(request.tokens)
            hashes = page_hashes(salted_root(self.root, request.cache_salt), request.tokens, self.page_tokens)
            for index, key in enumerate(hashes):
                truth[key] = values[index * self.page_tokens : (index + 1) * self.page_tokens]
        return truth
