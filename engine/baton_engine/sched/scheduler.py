"""The scheduler's door: continuous batching over one page pool, as pure planning.

Job: decide what each step computes, who owns rows and pages, and when a request is over.
Invariants: every submitted request gets exactly one Ended; a page is reused only after its fences; what is planned fits.
Does not know: torch, devices, threads, clocks (now_s is passed in, never decreasing), roles, transports.

One iteration of the engine thread:
    events (submit, abort, kv_*, handoff_*) -> retire -> plan -> DRAIN -> launch + launched -> collect(previous) -> DRAIN
Plan n+1 is made before the tokens of step n are known: a row that sampled in step n goes on with `input_ids=()`.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.errors import BatonError
from baton_common.ids import PageHash, RequestId
from baton_engine.request import Request
from baton_engine.role import Fence, TokenLogprobs
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.records import Outcome, SchedulerLoad
from baton_engine.step import StepPlan


class Scheduler:
    """Single-threaded; nothing blocks. Events for unknown or already ending requests are ignored: they lost a race."""

    context_tokens: int  # longest prompt + output here: the model's context, or the whole pool if that is smaller

    def __init__(self, config: SchedulerConfig) -> None: ...

    # ---- events in ------------------------------------------------------------------------------------------------
    def submit(self, request: Request, now_s: float) -> None:
        """Queue it (LOCAL, PREFILL) or answer at once with Reserved, TurnedLocal or a refusal (RESERVE).

        Refusals are Ended outcomes: InvalidRequest, Overloaded, DeadlineExceeded.
        """
        raise NotImplementedError

    def abort(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """End it with `error`, whatever it does now."""
        raise NotImplementedError

    def abort_all(self, error: BatonError, now_s: float) -> None:
        """End everything with `error` (shutdown)."""
        raise NotImplementedError

    def kv_receiving(self, request_id: RequestId, now_s: float) -> None:
        """RESERVE: the first chunk arrived."""
        raise NotImplementedError

    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None, now_s: float) -> None:
        """RESERVE: all KV is in the pages and verified; `token_id` is the next output, made by the sender.

        The token is not repeated in a Tokens record, unless it ends the request by our rules: then once, with `finish`.
        """
        raise NotImplementedError

    def kv_failed(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """RESERVE: the KV will not come."""
        raise NotImplementedError

    def handoff_done(self, request_id: RequestId, now_s: float) -> None:
        """PREFILL: the receiver committed."""
        raise NotImplementedError

    def handoff_failed(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """PREFILL: the receiver will not commit."""
        raise NotImplementedError

    def kv_released(self, request_id: RequestId, fence: Fence, now_s: float) -> None:
        """Answer to a KvRelease outcome: the pages are free once `fence` is done."""
        raise NotImplementedError

    # ---- one iteration --------------------------------------------------------------------------------------------
    def retire(self, now_s: float) -> None:
        """Poll fences, free what they held back, end requests whose deadline passed. Cheap; call every iteration."""
        raise NotImplementedError

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when no row has anything to compute. Numbers are 1, 2, 3, ... without gaps.

        The plan is a promise: it must be launched (`launched`) and, after it completed, collected, in this order.
        """
        raise NotImplementedError

    def launched(self, number: int, fence: Fence) -> None:
        """Step `number` is queued on the device; `fence` is done when nothing of it touches a page any more."""
        raise NotImplementedError

    def collect(
        self, number: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], now_s: float
    ) -> None:
        """Results of the oldest uncollected step: one token per work item with `sample`, in their order.

        `logprobs` has the same length, or is empty when no row asked for any.
        """
        raise NotImplementedError

    def drain(self) -> list[Outcome]:
        """Outcomes since the last call, in order; handling them may make more (kv_released)."""
        raise NotImplementedError

    # ---- looking in -----------------------------------------------------------------------------------------------
    def sleep_s(self, now_s: float) -> float | None:
        """How long the engine may wait for events when `plan` gave None: 0 = not at all, None = for ever.

        Short while a fence is polled, else until the nearest deadline.
        """
        raise NotImplementedError

    def load(self) -> SchedulerLoad:
        """O(waiting requests)."""
        raise NotImplementedError

    def cached_hashes(self) -> list[PageHash]:
        """Every page in the prefix tree; consistent with the KvEvents drained so far."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise LeakError naming page and owner unless free + cached + leased + in_flight == total. O(pages)."""
        raise NotImplementedError
