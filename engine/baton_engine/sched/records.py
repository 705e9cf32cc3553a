"""What the scheduler tells the engine. Outcomes are handled in order; each maps to one hook of the role.

The scheduler never calls outwards: it queues these, and the engine drains them (Scheduler.drain).
"""

from __future__ import annotations

from dataclasses import dataclass

from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId
from baton_engine.kv.pages import PageCounts
from baton_engine.request import Request
from baton_engine.role import Fence, TokenOut


class Hold:
    """A fence on pages that were told; done when the answer is here, and the fence that it gave, if any, is done."""

    def __init__(self) -> None:
        self._answered = False
        self._fence: Fence | None = None

    def answer(self, fence: Fence | None) -> None:
        self._answered, self._fence = True, fence

    def done(self) -> bool:
        return self._answered and (self._fence is None or self._fence.done())


@dataclass(frozen=True, slots=True, kw_only=True)
class FillWanted:
    """-> Role.on_fill. Pages of all `tokens`; Scheduler.kv_filled answers."""

    request: Request
    pages: tuple[PageId, ...]
    hashes: tuple[PageHash, ...]  # of the pages that may be filled, from the first page of the table
    have_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesShared:
    """-> Role.on_pages, whose fence goes to `hold`. The pages are in the tree; until then they hold still."""

    hashes: tuple[PageHash, ...]
    pages: tuple[PageId, ...]
    hold: Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """-> Role.on_reserved. Pages of all `tokens`; KV of [first_missing_token, len(tokens)) is wanted."""

    request: Request
    pages: tuple[PageId, ...]
    first_missing_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedLocal:
    """-> Role.on_local. The request's mode is LOCAL from here on."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillAdmitted:
    """-> Role.on_prefill_admitted. Must be delivered before the plan that admitted the request is launched."""

    request: Request
    pages: tuple[PageId, ...]
    computed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """-> Role.on_tokens. All tokens of one collected step; `step` is 0 for a token that no step of ours made."""

    step: int
    tokens: tuple[TokenOut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    """-> Role.on_prefill_done, after the Tokens record that holds `first`."""

    request: Request
    first: TokenOut


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRelease:
    """-> Role.release_kv; its fence must come back through Scheduler.kv_released. Until then the pages stay leased.

    At the end of a request whose pages the role knows, or when a RESERVE request is preempted after its KV arrived.
    """

    request: Request
    error: BatonError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """For the log and a counter: the request lost its pages; `lost_tokens` positions are not in the prefix tree."""

    request: Request
    lost_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvents:
    """-> Role.on_kv_events. Net change of the prefix tree since the last one: no hash is in both lists."""

    stored: tuple[PageHash, ...]
    removed: tuple[PageHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """-> Role.on_ended. The request is FREED and owns nothing. Exactly once per submitted request."""

    request: Request
    error: BatonError | None


Outcome = (
    FillWanted
    | PagesShared
    | Reserved
    | TurnedLocal
    | PrefillAdmitted
    | Tokens
    | PrefillDone
    | KvRelease
    | Preempted
    | KvEvents
    | Ended
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLoad:
    """A snapshot for stats, metrics and the router's choice."""

    queued_requests: int
    queued_tokens: int  # prompt tokens not computed yet, of waiting, filling and prefilling requests
    filling: int  # FILLING: KV may come from elsewhere, or it came and a row is missing
    prefilling: int
    running: int
    reserved: int  # RESERVED, RECEIVING and READY; and FILLING, if they wait for a sender's KV afterwards
    sending: int
    fencing: int  # over, but something may still touch their pages
    free_pages: int  # free now, or cached and evictable
    total_pages: int
    pages: PageCounts
    unsent_tokens: int  # KV that was announced and had not left when the last step was planned
    preemptions: int  # since start
    submitted: int
    ended: int
