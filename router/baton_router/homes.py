"""Which worker keeps the KV of which session, as far as this router sent it there. Pure; bounded.

Kept KV may lie where KV events do not reach, so the router remembers where each turn went, and by which pages the next
one will be known. That is a hint: a wrong one costs time, never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from baton_common.clock import Clock
from baton_common.ids import PageHash
from baton_proto import worker_pb2 as wire

MAX_HOMES = 65_536
"""About 20 MB; the one that was used least lately is forgotten."""
TAIL_PAGES = 4
"""The end of a prompt is not always the beginning of the next: templates write the open turn differently."""


class _Home(NamedTuple):
    worker: str  # key, so that another life of the worker is another one
    pages: int  # full pages of the turn that went there
    tail: tuple[PageHash, ...]  # the last of them; each names all pages before it, too
    until_s: float


class Homes:
    """Where the newest turn of each session went."""

    def __init__(self, clock: Clock, limit: int = MAX_HOMES) -> None:
        self._clock = clock
        self._limit = limit
        self._homes: OrderedDict[tuple[str, str], _Home] = OrderedDict()

    def went(self, keep: wire.KvKeep, worker: str, hashes: Sequence[PageHash]) -> None:
        """A turn whose prompt has these full pages will be kept by `worker`."""
        name = (keep.tenant, keep.session)
        self._homes.pop(name, None)
        if hashes:
            until_s = self._clock.now() + keep.ttl_ms / 1000
            tail = tuple(hashes[-TAIL_PAGES:])
            self._homes[name] = _Home(worker=worker, pages=len(hashes), tail=tail, until_s=until_s)
            if len(self._homes) > self._limit:
                self._homes.popitem(last=False)

    def kept_pages(self, keep: wire.KvKeep, worker: str, hashes: Sequence[PageHash]) -> int:
        """How many of the pages that a prompt begins with `worker` keeps for the session, as far as is known."""
        home = self._homes.get((keep.tenant, keep.session))
        if home is None or home.worker != worker or home.until_s < self._clock.now():
            return 0
        for back, page in enumerate(reversed(home.tail)):
            pages = home.pages - back
            if pages <= len(hashes) and hashes[pages - 1] == page:
                return pages
        return 0

    def forget(self, session: str, tenant: str) -> None:
        """The session is over. Idempotent."""
        self._homes.pop((tenant, session), None)
