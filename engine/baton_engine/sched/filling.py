"""Requests that hold pages while KV of their prompt may come from elsewhere: FILLING, then a row or the sender's KV.

    QUEUED -> FILLING (on_fill) -> kv_filled -> LOCAL, PREFILL: `filled`, waits for a row -> PREFILLING
                                                RESERVE: RESERVED, or turns local as above if little enough is missing
Invariants: at most `max_filling` hold pages this way; a filling request is never preempted, it ends with its deadline
at the latest, and then its pages wait for the fence of release_kv.
Does not know: where KV comes from.
"""

from __future__ import annotations

from baton_engine.kv.tree import Match
from baton_engine.request import IllegalTransition, Mode, Phase
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.entry import Entry
from baton_engine.sched.lifecycle import Lifecycle
from baton_engine.sched.records import FillWanted, Reserved, TurnedLocal
from baton_engine.sched.sharing import Sharing


class Filling:
    def __init__(self, config: SchedulerConfig, life: Lifecycle, sharing: Sharing) -> None:
        self._config = config
        self._life = life
        self._sharing = sharing

    @property
    def reserving(self) -> int:
        """How many of them wait for a sender's KV afterwards."""
        return sum(entry.request.mode is Mode.RESERVE for entry in self._life.filling)

    def wanted(self, entry: Entry, match: Match) -> bool:
        """Whether an admission that finds `match` is to be filled. Beyond the bound it computes at once."""
        life = self._life
        if not entry.request.fills or len(life.filling) + len(life.filled) >= self._config.max_filling:
            return False
        return len(match.pages) < self._fillable(entry)

    def begin(self, entry: Entry, now_s: float) -> None:
        """The lease is there; the role is told, and answers."""
        request, lease, page = entry.request, entry.lease, self._config.page_tokens
        assert lease is not None, "a request fills its own pages"
        request.advance(Phase.FILLING, now_s)
        self._life.filling.add(entry)
        entry.announced = True
        self._life.outbox.append(
            FillWanted(
                request=request,
                pages=tuple(lease.pages[: -(-len(request.tokens) // page)]),
                hashes=tuple(request.hashes[: self._fillable(entry)]),
                have_tokens=entry.written,
            )
        )

    def filled(self, entry: Entry, tokens: int, now_s: float) -> None:
        """KV of [0, tokens) is in the pages."""
        life, request, page = self._life, entry.request, self._config.page_tokens
        if entry.queue is not life.filling:
            raise IllegalTransition(
                f"{request.request_id}: filled in phase {request.phase.value}", request_id=request.request_id
            )
        if tokens % page or not entry.written <= tokens <= self._fillable(entry) * page:
            raise ValueError(
                f"{request.request_id}: KV of {tokens} tokens; not whole pages of {page}, or not between "
                f"{entry.written} and {self._fillable(entry) * page}"
            )
        entry.announced = False  # nobody writes into the pages any more
        request.filled_tokens += tokens - entry.written
        entry.planned = entry.written = tokens
        if not request.preemptions:
            request.cached_tokens = tokens
        self._sharing.commit(entry)
        self._sharing.look_again(entry)  # filling took its time
        if request.mode is Mode.RESERVE and entry.remaining >= request.local_below_tokens:
            self.reserve(entry, now_s)
            return
        if request.mode is Mode.RESERVE:
            request.mode = Mode.LOCAL
            life.outbox.append(TurnedLocal(request=request))
        life.filled.add(entry)

    def reserve(self, entry: Entry, now_s: float) -> None:
        """RESERVE: what the pages lack is wanted from the sender."""
        request, lease = entry.request, entry.lease
        assert lease is not None, "a reservation has its pages"
        entry.announced = True
        request.advance(Phase.RESERVED, now_s)
        self._life.staged.add(entry)
        prompt = tuple(lease.pages[: -(-len(request.tokens) // self._config.page_tokens)])
        self._life.outbox.append(Reserved(request=request, pages=prompt, first_missing_token=entry.written))

    def _fillable(self, entry: Entry) -> int:
        """Full pages that may be filled: at least the last token is computed, so that there are logits to sample."""
        return (len(entry.request.tokens) - 1) // self._config.page_tokens
