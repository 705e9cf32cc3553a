"""The scheduler's door: continuous batching over one page pool, as pure planning.

Job: decide what each step computes, who owns rows and pages, and when a request is over.
Invariants: every submitted request gets exactly one Ended; a page is reused only after its fences; a plan fits.
Does not know: torch, devices, threads, clocks (now_s is passed in, never decreasing), roles, transports.

One iteration of the engine thread:
  events (submit, abort, kv_*, handoff_*) -> retire -> plan -> DRAIN -> launch, launched -> collect(previous) -> DRAIN
Plan n+1 is made before the tokens of step n are known: a row that sampled in step n goes on with `input_ids=()`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded
from baton_common.hashing import salted_root
from baton_common.ids import PageHash, RequestId
from baton_engine.kv.cache import KvCache
from baton_engine.request import Mode, Phase, Request
from baton_engine.role import Fence, TokenLogprobs, TokenOut
from baton_engine.sched import policy
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.entry import Entry, StepFence, hash_pages
from baton_engine.sched.filling import Filling
from baton_engine.sched.lifecycle import Lifecycle
from baton_engine.sched.planner import Planner
from baton_engine.sched.records import KvEvents, Outcome, PrefillDone, SchedulerLoad, Tokens, TurnedLocal
from baton_engine.sched.sharing import Sharing
from baton_engine.step import RowWork, StepPlan

FENCE_POLL_S = 0.001
RATE_WEIGHT = 0.2  # of the newest step in the moving average of tokens per second


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A planned step; `entries` are aligned with plan.work."""

    plan: StepPlan
    entries: list[Entry]
    fence: StepFence
    planned_s: float


class Scheduler:
    """Single-threaded; nothing blocks. Events for unknown or already ending requests are ignored: they lost a race."""

    context_tokens: int  # longest prompt + output here: the model's context, or the whole pool if that is smaller

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.context_tokens = min(config.context_tokens, config.total_pages * config.page_tokens)
        self._cache = KvCache(config.total_pages)
        self._life = Lifecycle(config, self._cache)
        self._sharing = Sharing(self._cache, config.page_tokens)
        self._filling = Filling(config, self._life, self._sharing)
        self._planner = Planner(config, self.context_tokens, self._life, self._sharing, self._filling)
        self._flights: deque[_Flight] = deque()  # oldest first
        self._number = 0
        self._changed = False  # something happened since the last plan
        self._tokens_per_s = 0.0
        self._collected_s = 0.0
        self._unsent_tokens = 0

    def tell_pages(self) -> None:
        """From here on every page that enters the tree, or is found there by another request, is a PagesShared."""
        self._sharing.tells = True

    def name_pages(self, request: Request) -> None:
        """Put the hashes of the full pages that may be filled into `request.hashes`; before it is submitted."""
        if len(request.tokens) < self.context_tokens:
            root = salted_root(self._config.hash_root, request.cache_salt)
            hash_pages(request, root, len(request.tokens) - 1, self._config.page_tokens)

    # ---- events in ------------------------------------------------------------------------------------------------
    def submit(self, request: Request, now_s: float) -> None:
        """Queue it (LOCAL, PREFILL) or answer at once with Reserved, TurnedLocal or a refusal (RESERVE).

        Refusals are Ended outcomes: InvalidRequest, Overloaded, DeadlineExceeded.
        """
        self._changed = True
        refusal = self._refusal(request, now_s)
        if refusal is not None:
            self._life.refuse(request, refusal, now_s)
            return
        entry = self._life.enter(request, now_s)
        if request.mode is Mode.RESERVE and not self._turns_local(entry):
            self._reserve(entry, now_s)
        elif len(self._life.waiting) >= self._config.max_queued:
            self._overloaded(entry, f"{len(self._life.waiting)} requests wait already", now_s)
        else:
            if request.mode is Mode.RESERVE:
                request.mode = Mode.LOCAL
                self._life.outbox.append(TurnedLocal(request=request))
            self._life.waiting.add(entry)

    def abort(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """End it with `error`, whatever it does now."""
        self._fail(request_id, error, now_s)

    def abort_all(self, error: BatonError, now_s: float) -> None:
        """End everything with `error` (shutdown)."""
        for request_id in list(self._life.entries):
            self._fail(request_id, error, now_s)

    def kv_filled(self, request_id: RequestId, tokens: int, now_s: float) -> None:
        """FILLING: KV of [0, tokens) is in the pages, a page border. The rest is computed, or comes from the sender."""
        entry = self._life.find(request_id)
        if entry is not None:
            self._changed = True
            self._filling.filled(entry, tokens, now_s)
            self._sharing.tell(self._life.outbox)

    def kv_receiving(self, request_id: RequestId, now_s: float) -> None:
        """RESERVE: the first chunk arrived."""
        entry = self._life.find(request_id)
        if entry is not None:
            entry.request.advance(Phase.RECEIVING, now_s)

    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None, now_s: float) -> None:
        """RESERVE: all KV is in the pages and verified; `token_id` is the next output, made by the sender.

        The token is not repeated in a Tokens record, unless it ends the request by our rules: then once, with `finish`.
        """
        entry = self._life.find(request_id)
        if entry is None:
            return
        self._changed = True
        entry.request.advance(Phase.READY, now_s)
        entry.planned = entry.written = len(entry.request.tokens)
        self._sharing.commit(entry)
        token = self._append(entry, token_id, logprobs)
        if token.finish is None:
            entry.cached_told = False
            self._life.ready.add(entry)
        else:
            self._life.outbox.append(Tokens(step=0, tokens=(token,)))
            self._life.finish(entry, Phase.FINISHED, now_s)
        self._sharing.tell(self._life.outbox)

    def kv_failed(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """RESERVE: the KV will not come. After kv_received it changes nothing: the KV is here."""
        entry = self._life.find(request_id)
        if entry is not None and entry.request.phase in (Phase.RESERVED, Phase.RECEIVING):
            self._fail(request_id, error, now_s)

    def handoff_done(self, request_id: RequestId, now_s: float) -> None:
        """PREFILL: the receiver committed."""
        entry = self._life.find(request_id)
        if entry is not None:
            self._changed = True
            self._life.finish(entry, Phase.HANDED_OFF, now_s)

    def handoff_failed(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        """PREFILL: the receiver will not commit."""
        self._fail(request_id, error, now_s)

    def kv_released(self, request_id: RequestId, fence: Fence, now_s: float) -> None:
        """Answer to a KvRelease outcome: the pages are free once `fence` is done."""
        self._changed = True
        self._life.kv_released(request_id, fence, now_s)

    # ---- one iteration --------------------------------------------------------------------------------------------
    def retire(self, now_s: float) -> None:
        """Poll fences, free what they held back, end requests whose deadline passed. Cheap; call every iteration."""
        before = self._cache.obtainable, self._life.ended
        self._life.retire(now_s)
        self._sharing.retire()
        self._changed |= before != (self._cache.obtainable, self._life.ended)

    def plan(self, now_s: float, *, unsent_tokens: int = 0) -> StepPlan | None:
        """The next step, or None when no row has anything to compute. Numbers are 1, 2, 3, ... without gaps.

        `unsent_tokens`: KV that PREFILL requests announced and that has not left; far ahead, no new one is admitted.

        The plan is a promise: it must be launched (`launched`) and, after it completed, collected, in this order.
        """
        preemptions = self._life.preemptions
        fence = StepFence()
        self._unsent_tokens = unsent_tokens
        made = self._planner.make(self._number + 1, fence, now_s, unsent_tokens=unsent_tokens)
        self._sharing.tell(self._life.outbox)
        # A preemption may have made room for somebody whose turn was over already.
        self._changed = self._life.preemptions > preemptions
        if made is None:
            return None
        plan, entries = made
        self._number = plan.number
        self._flights.append(_Flight(plan=plan, entries=entries, fence=fence, planned_s=now_s))
        return plan

    def launched(self, number: int, fence: Fence) -> None:
        """Step `number` is queued on the device; `fence` is done when nothing of it touches a page any more."""
        newest = self._flights[-1]
        if newest.plan.number != number:
            raise ValueError(f"step {number} was launched, {newest.plan.number} was planned last")
        newest.fence.attach(fence)

    def collect(
        self, number: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], now_s: float
    ) -> None:
        """Results of the oldest uncollected step: one token per work item with `sample`, in their order.

        `logprobs` has the same length, or is empty when no row asked for any.
        """
        flight = self._flights.popleft()
        if flight.plan.number != number:
            raise ValueError(f"step {number} is collected, {flight.plan.number} is the oldest in flight")
        self._changed = True
        self._measure(flight, now_s)
        sampled = iter(zip(token_ids, logprobs or [None] * len(token_ids), strict=True))
        made: list[tuple[Entry, TokenOut]] = []
        for work, entry in zip(flight.plan.work, flight.entries, strict=True):
            entry.open_steps -= 1
            result = next(sampled) if work.sample else None
            entry.pending -= work.sample
            # Over: the one token that a row computes past its end, or that came after an abort, is dropped.
            if entry.over:
                continue
            self._written(entry, work)
            if result is not None:
                made.append((entry, self._append(entry, *result)))
            elif entry.request.phase is Phase.PREEMPTED:
                self._life.requeue(entry, now_s)
        if next(sampled, None) is not None:
            raise ValueError(f"step {number} has more tokens than sampled rows")
        if made:
            self._life.outbox.append(Tokens(step=number, tokens=tuple(token for _, token in made)))
        for entry, token in made:
            self._after_token(entry, token, now_s)
        self._sharing.tell(self._life.outbox)

    def drain(self) -> list[Outcome]:
        """Outcomes since the last call, in order; handling them may make more (kv_released)."""
        outcomes = self._life.outbox
        self._life.outbox = []
        stored, removed = self._cache.drain_events()
        if stored or removed:
            outcomes.append(KvEvents(stored=tuple(stored), removed=tuple(removed)))
        return outcomes

    # ---- looking in -----------------------------------------------------------------------------------------------
    def sleep_s(self, now_s: float) -> float | None:
        """How long the engine may wait for events when `plan` gave None: 0 = not at all, None = for ever.

        Short while a fence or the network is polled, else until the nearest deadline.
        """
        if self._changed or self._flights or self._life.outbox:
            return 0.0
        if self._life.fencing or self._cache.fencing or self._planner.held_back:
            return FENCE_POLL_S
        deadline_s = self._life.next_deadline_s()
        return None if deadline_s is None else max(0.0, deadline_s - now_s)

    def load(self) -> SchedulerLoad:
        """O(waiting requests)."""
        life, counts = self._life, self._cache.counts()
        phases = [entry.request.phase for entry in life.entries.values()]
        return SchedulerLoad(
            queued_requests=len(life.waiting),
            queued_tokens=self._waiting_tokens(),
            filling=phases.count(Phase.FILLING),
            prefilling=phases.count(Phase.PREFILLING),
            running=phases.count(Phase.RUNNING),
            reserved=len(life.staged) + len(life.ready) + self._filling.reserving,
            sending=phases.count(Phase.SENDING),
            fencing=life.fencing,
            free_pages=self._cache.obtainable,
            total_pages=counts.total,
            pages=counts,
            unsent_tokens=self._unsent_tokens,
            preemptions=life.preemptions,
            submitted=life.submitted,
            ended=life.ended,
        )

    def cached_hashes(self) -> list[PageHash]:
        """Every page in the prefix tree; consistent with the KvEvents drained so far."""
        return self._cache.hashes()

    def check(self) -> None:
        """Raise LeakError naming page and owner unless free + cached + leased + in_flight == total. O(pages)."""
        self._life.check()

    # ---- submit ---------------------------------------------------------------------------------------------------
    def _refusal(self, request: Request, now_s: float) -> BatonError | None:
        if request.request_id in self._life.entries:
            return InvalidRequest("this request id is in use", request_id=request.request_id, param="request_id")
        if request.deadline_s <= now_s:
            return DeadlineExceeded("deadline passed before arrival", request_id=request.request_id)
        return policy.refusal(request, self._config)

    def _turns_local(self, entry: Entry) -> bool:
        request, page = entry.request, self._config.page_tokens
        match = self._cache.match(entry.hash_pages(len(request.tokens) - 1, page))
        return len(request.tokens) - len(match.pages) * page < request.local_below_tokens

    def _reserve(self, entry: Entry, now_s: float) -> None:
        life = self._life
        holding = len(life.staged) + len(life.ready) + self._filling.reserving
        found = None if self._planner.crowded else self._planner.admissible(entry)
        if holding >= self._config.max_reserved:
            self._overloaded(entry, f"{holding} requests hold reserved pages already", now_s)
        elif found is None:
            self._overloaded(entry, f"{self._cache.obtainable} KV pages are free, too few for this prompt", now_s)
        else:
            match, pages = found
            fills = self._filling.wanted(entry, match)
            self._sharing.lease(entry, match, pages)
            if fills:
                self._filling.begin(entry, now_s)
            else:
                self._filling.reserve(entry, now_s)
            self._sharing.tell(life.outbox)

    def _overloaded(self, entry: Entry, reason: str, now_s: float) -> None:
        retry_ms = policy.retry_after_ms(self._waiting_tokens(), self._tokens_per_s)
        error = Overloaded(
            f"{reason}; retry in {retry_ms} ms", request_id=entry.request.request_id, retry_after_ms=retry_ms
        )
        self._life.fail(entry, error, now_s)

    def _waiting_tokens(self) -> int:
        """Waiting prompts count in full: what the cache will save is known at admission."""
        life = self._life
        waiting = sum(len(entry.request.tokens) for entry in life.waiting)
        filling = sum(entry.remaining for entry in life.filling if entry.request.mode is not Mode.RESERVE)
        return waiting + filling + sum(entry.remaining for queue in (life.filled, life.prefilling) for entry in queue)

    # ---- collect --------------------------------------------------------------------------------------------------
    def _written(self, entry: Entry, work: RowWork) -> None:
        if entry.request.phase is Phase.PREEMPTED:
            return
        before = entry.written // self._config.page_tokens
        entry.written = work.start + work.count
        if entry.written // self._config.page_tokens > before:
            self._sharing.commit(entry)

    def _append(self, entry: Entry, token_id: int, logprobs: TokenLogprobs | None) -> TokenOut:
        request = entry.request
        position = request.output_tokens
        request.tokens.append(token_id)
        cached = None if entry.cached_told else request.cached_tokens
        entry.cached_told = True
        return TokenOut(
            request_id=request.request_id,
            position=position,
            token_id=token_id,
            finish=policy.finish_reason(request, self._config.eos_token_ids, self.context_tokens),
            logprobs=logprobs,
            cached_tokens=cached,
        )

    def _after_token(self, entry: Entry, token: TokenOut, now_s: float) -> None:
        """The edge that a collected token takes its request along."""
        life, request = self._life, entry.request
        if token.finish is not None:
            life.finish(entry, Phase.FINISHED, now_s)
        elif request.phase is Phase.PREEMPTED:
            life.requeue(entry, now_s)
        elif request.mode is Mode.PREFILL:
            request.advance(Phase.SENDING, now_s)
            life.give_row(entry)
            life.outbox.append(PrefillDone(request=request, first=token))
        elif request.phase is Phase.PREFILLING:
            request.advance(Phase.RUNNING, now_s)

    def _measure(self, flight: _Flight, now_s: float) -> None:
        elapsed_s = now_s - max(flight.planned_s, self._collected_s)
        self._collected_s = now_s
        if elapsed_s > 0:
            rate = flight.plan.tokens / elapsed_s
            weight = RATE_WEIGHT if self._tokens_per_s else 1.0
            self._tokens_per_s += weight * (rate - self._tokens_per_s)

    def _fail(self, request_id: RequestId, error: BatonError, now_s: float) -> None:
        entry = self._life.find(request_id)
        if entry is not None:
            self._changed = True
            self._life.fail(entry, error, now_s)
