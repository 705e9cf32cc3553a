"""KV of a new request that others hold already: from storage tiers, from the decode worker that the ticket names.

A `Source` is asked in turn, each from where the one before stopped; then the engine is told how far KV reaches. Nothing
found, too late or damaged only means that more is computed. Calls come from the engine thread (`begin`, `stop`) and
from threads of the sources (`done`); none blocks. Invariant: after `stop` returned, no source starts to write into the
request's pages, and its fence says when the running write is over.
It does not know what a source is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import Request
from baton_engine.role import Fence
from baton_worker.ports import AllDone, EnginePort

log = logging.getLogger("baton.worker")

Done = Callable[[int], None]
"""KV of [0, tokens) is in the pages; `tokens` is a page border, never below where the source began. From any thread,
but not while holding a lock that `stop` takes."""


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


@dataclass(slots=True, kw_only=True)
class _Run:
    """One request that is being filled."""

    filling: Filling
    tokens: int  # KV of [0, tokens) is there
    next: int = 0  # of the sources
    over: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)  # a source may answer from inside `fill`


class Filler:
    """Asks its sources for one request after the other, and tells the engine. Sources own their deadlines.

    Ownership of the pages: the request leases them throughout; one source at a time writes into them, from its `fill`
    to its `done` or the fence of its `stop`.
    """

    def __init__(self, *, engine: EnginePort, sources: Sequence[Source], page_tokens: int) -> None:
        """`sources`: asked in this order."""
        self._engine = engine
        self._sources = tuple(sources)
        self._page_tokens = page_tokens
        self._lock = threading.Lock()
        self._runs: dict[RequestId, _Run] = {}

    def wants(self, request: Request) -> bool:
        """Whether any source may have KV for it."""
        return any(source.wants(request) for source in self._sources)

    def begin(self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int) -> None:
        """`Engine.kv_filled` follows once, unless `stop` comes before. `have_tokens`: a page border."""
        filling = Filling(request=request, pages=pages, hashes=hashes, page_tokens=self._page_tokens)
        run = _Run(filling=filling, tokens=have_tokens)
        with self._lock:
            self._runs[request.request_id] = run
        self._go_on(run)

    def stop(self, request_id: RequestId) -> Fence:
        """The request is over; also for one that is not being filled."""
        with self._lock:
            run = self._runs.pop(request_id, None)
        if run is None:
            return AllDone()
        with run.lock:
            run.over = True
            return AllDone(*(source.stop(request_id) for source in self._sources[: run.next]))

    def _go_on(self, run: _Run) -> None:
        """Ask the next source, or tell the engine that there is none."""
        with run.lock:
            while not run.over and run.next < len(self._sources) and run.tokens < run.filling.end_token:
                source = self._sources[run.next]
                run.next += 1
                if source.wants(run.filling.request):
                    self._ask(run, source)
                    return
            if not run.over:
                self._end(run)

    def _end(self, run: _Run) -> None:
        """With the lock of the run, so that after `stop` the engine is told nothing."""
        run.over = True
        request_id = run.filling.request.request_id
        self._engine.kv_filled(request_id, run.tokens)
        with self._lock:
            if self._runs.get(request_id) is run:
                del self._runs[request_id]

    def _ask(self, run: _Run, source: Source) -> None:
        turn, request_id = run.next, run.filling.request.request_id
        try:
            source.fill(run.filling, run.tokens, partial(self._filled, run, turn))
        except Exception:
            log.exception("a source of KV failed", extra={"request": request_id})
            if source.stop(request_id).done():
                self._filled(run, turn, run.tokens)
            else:  # what it began to write must end before anybody else writes there: only the end of the request waits
                error = BatonError("KV of the request is damaged; retry", kind=ErrorKind.TRANSFER)
                self._engine.abort(request_id, error)

    def _filled(self, run: _Run, turn: int, tokens: int) -> None:
        """A source is done; a second answer, or one that crossed `stop`, is none."""
        with run.lock:
            if run.over or run.next != turn:
                return
            run.tokens = max(run.tokens, min(tokens, run.filling.end_token))
            self._go_on(run)
