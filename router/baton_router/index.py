"""Which pages one worker holds, as told by its KV events. Pure; a wrong entry costs time, never correctness."""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.hashing import HASH_BYTES
from baton_common.ids import PageHash
from baton_proto.worker_pb2 import KvEvents


class PageIndex:
    """Set of page hashes of one worker, kept in step by sequence numbers.

    After a gap it goes on applying events (better a hint than none) and reports that a snapshot is wanted.
    """

    def __init__(self) -> None:
        self._pages: set[bytes] = set()
        self._sequence: int | None = None

    def __len__(self) -> int:
        return len(self._pages)

    def apply(self, events: KvEvents) -> bool:
        """Returns False when messages were missed and a snapshot should be asked for."""
        if events.snapshot:
            self._pages.clear()
            gap = False
        else:
            gap = self._sequence is None or events.sequence != self._sequence + 1
        self._sequence = None if gap else events.sequence
        self._pages.difference_update(_split(events.removed))
        self._pages.update(_split(events.stored))
        return not gap

    def matched_pages(self, hashes: Sequence[PageHash]) -> int:
        """Length of the longest prefix that is held. O(matched)."""
        pages = self._pages
        for count, page in enumerate(hashes):
            if page not in pages:
                return count
        return len(hashes)


def _split(packed: bytes) -> list[bytes]:
    return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]
