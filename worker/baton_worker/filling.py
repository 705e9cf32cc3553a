"""KV of a new request that others hold already: from storage tiers, from the decode worker that the ticket names.

A `Source` is asked in turn, each from where the one before stopped; then the engine is told how far KV reaches. Nothing
found, too late or damaged only means that more is computed. Calls come from the engine thread (`begin`, `stop`) and
from threads of the sources (`done`); none blocks. Invariant: after `stop` returned, no source starts to write into the
request's pages, and its fence says when the running write is over.
It does not know what a source is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import Request
from baton_engine.role import Fence

Done = Callable[[int], None]
"""KV of [0, tokens) is in the pages; `tokens` is a page border, never below where the source began. From any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """What is wanted for one request."""

    request: Request
    pages: Sequence[PageId]  # of the whole prompt
    hashes: Sequence[PageHash]  # of its full pages that may be filled: `hashes[i]` names `pages[i]`
    page_tokens: int

    @property
    def end_token(self) -> int:
        """Filling never goes beyond."""
        return len(self.hashes) * self.page_tokens


class Source(Protocol):
    def wants(self, request: Request) -> bool:
        """Whether it may have anything for it. Cheap; engine thread."""

    def fill(self, filling: Filling, first_token: int, done: Done) -> None:
        """Put KV of positions from `first_token` on into the pages, then call `done` once; not after `stop`."""

    def stop(self, request_id: RequestId) -> Fence:
        """No write into its pages starts after this. Idempotent; also for a request it never heard of."""
