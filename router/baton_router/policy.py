"""Choice of the (decode, prefill) pair for one prompt. Pure: no I/O, no clock, no randomness.

Cost is the estimated time to the first tokens in milliseconds: prompt tokens queued before ours and those of our own
that neither of the pair has, over the measured prefill rate, moves of KV both ways, and the pressure of what decodes
already. Equal costs go round robin by `turn`. A worker that is overloaded for this request (`busy`) refuses the whole
choice when nothing else is left; one that failed (`failed`) is simply not used, and without any usable prefill worker
decode does it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

DEFAULT_PREFILL_TOKENS_PER_S = 2000.0
DEFAULT_STEP_MS = 20.0
MOVE_MS_PER_TOKEN = 0.005
PAGE_SHORTAGE_MS = 10_000.0


class WorkerRole(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What the policy may know about one connected, live worker."""

    key: str  # worker id + incarnation
    role: WorkerRole
    compat: bytes  # equal bytes = may be paired
    page_tokens: int
    matched_pages: int
    queued_tokens: int
    running: int
    free_pages: int
    total_pages: int  # 0 = no load report yet
    step_ms: float
    prefill_tokens_per_s: float
    draining: bool = False

    @property
    def matched_tokens(self) -> int:
        """Of the prompt, whose KV it has."""
        return self.matched_pages * self.page_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The request as the policy sees it. `failed` and `busy` hold keys of workers."""

    tokens: int
    local_below_tokens: int
    failed: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`prefill` is None when the decode worker must do the prompt itself."""

    decode: str
    prefill: str | None
    cost_ms: float


class Refusal(Enum):
    NO_WORKER = "no_worker"
    OVERLOADED = "overloaded"


def choose(views: Iterable[WorkerView], need: Need, turn: int) -> Pair | Refusal:
    """Cheapest pair. Deterministic for equal arguments."""
    usable = [view for view in views if not view.draining and view.key not in need.failed]
    decodes = [view for view in usable if view.role is not WorkerRole.PREFILL]
    free = [view for view in decodes if view.key not in need.busy]
    if not free:
        return Refusal.OVERLOADED if decodes else Refusal.NO_WORKER
    prefills = [view for view in usable if view.role is WorkerRole.PREFILL]
    pairs = [pair for decode in _rotate(free, turn) if (pair := _best_for(decode, prefills, need, turn)) is not None]
    return min(pairs, key=lambda pair: pair.cost_ms) if pairs else Refusal.OVERLOADED


def choose_target(views: Iterable[WorkerView], source: WorkerView, need: Need, turn: int) -> str | None:
    """The best decode worker to take over what `source` decodes; None when none fits or has the pages for it."""
    fitting = [
        view
        for view in views
        if view.role is WorkerRole.DECODE and view.compat == source.compat and not view.draining
        if view.key != source.key and view.key not in need.failed and _short_pages(view, need) == 0
    ]
    if source.role is not WorkerRole.DECODE or not fitting:
        return None
    return min(_rotate(fitting, turn), key=lambda view: _decode_ms(view, need)).key


def _best_for(decode: WorkerView, prefills: Sequence[WorkerView], need: Need, turn: int) -> Pair | None:
    """The cheapest pair with this decode worker; None when every prefill worker that fits it is busy."""
    alone = Pair(decode=decode.key, prefill=None, cost_ms=_decode_ms(decode, need) + _prefill_ms(decode, need))
    if decode.role is WorkerRole.COLOCATED:
        return alone
    fitting = [view for view in prefills if view.compat == decode.compat]
    if not fitting:
        return alone
    open_ones = _rotate([view for view in fitting if view.key not in need.busy], turn)
    short = _uncached(decode, need) < need.local_below_tokens
    if not open_ones:
        return alone if short else None
    moved = _uncached(decode, need) * MOVE_MS_PER_TOKEN
    held = decode.matched_tokens
    best = min(open_ones, key=lambda view: _prefill_ms(view, need, held))
    # with a short suffix the prefill worker is only named for the case that decode has lost the pages meanwhile
    cost = alone.cost_ms if short else _decode_ms(decode, need) + moved + _prefill_ms(best, need, held)
    return Pair(decode=decode.key, prefill=best.key, cost_ms=cost)


def _uncached(view: WorkerView, need: Need) -> int:
    return max(need.tokens - view.matched_tokens, 1)


def _prefill_ms(view: WorkerView, need: Need, held_tokens: int = 0) -> float:
    """`held_tokens`: of the prompt, on the decode worker; what this one has not of them it pulls back."""
    rate = view.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
    step_ms = view.step_ms or DEFAULT_STEP_MS
    # running decodes share the steps of whoever prefills
    shared = view.running * step_ms * 0.05 if view.role is not WorkerRole.PREFILL else 0.0
    pulled = max(held_tokens - view.matched_tokens, 0)
    computed = max(_uncached(view, need) - pulled, 1)
    return (view.queued_tokens + computed) * 1000.0 / rate + pulled * MOVE_MS_PER_TOKEN + shared


def _decode_ms(view: WorkerView, need: Need) -> float:
    """Every running request makes ours a little slower; too few pages would mean waiting for somebody's end."""
    step_ms = view.step_ms or DEFAULT_STEP_MS
    shortage = PAGE_SHORTAGE_MS if _short_pages(view, need) else 0.0
    used = 1.0 - view.free_pages / view.total_pages if view.total_pages else 0.0
    return view.running * step_ms * 0.25 + used * step_ms + shortage


def _short_pages(view: WorkerView, need: Need) -> int:
    """Pages that are missing there now, as far as it has said how many it has."""
    pages = -(-_uncached(view, need) // view.page_tokens)
    return max(pages - view.free_pages, 0) if view.total_pages else 0


def _rotate(views: Sequence[WorkerView], turn: int) -> list[WorkerView]:
    at = turn % len(views) if views else 0
    return [*views[at:], *views[:at]]
