"""Makes one StepPlan: running decodes, then continuing prefills and new admissions inside the token budget.

Invariants: every decode that has its page is in the step; planned tokens <= step_tokens; every planned position has
a leased page; only requests that may be recomputed are preempted (never a handoff or a fill in progress), newest first.
Does not know: sampled values, stop rules, fences. Functions run on the engine thread and touch only the lifecycle.
"""

from __future__ import annotations

from baton_common.ids import PageId
from baton_engine.kv.tree import Match
from baton_engine.request import Mode, Phase
from baton_engine.sched import policy
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.entry import Entry, StepFence
from baton_engine.sched.filling import Filling
from baton_engine.sched.lifecycle import Lifecycle
from baton_engine.sched.records import PrefillAdmitted
from baton_engine.sched.sharing import Sharing
from baton_engine.step import Form, RowAdmission, RowWork, StepPlan


class Planner:
    """`crowded` is true while somebody waits so long for pages that nobody may overtake; `held_back` while a PREFILL
    request waits for nothing but the network."""

    def __init__(
        self, config: SchedulerConfig, context_tokens: int, life: Lifecycle, sharing: Sharing, filling: Filling
    ) -> None:
        self._config = config
        self._context_tokens = context_tokens
        self._life = life
        self._sharing = sharing
        self._filling = filling
        self.crowded = False
        self.held_back = False

    def make(
        self, number: int, fence: StepFence, now_s: float, *, unsent_tokens: int
    ) -> tuple[StepPlan, list[Entry]] | None:
        """The plan and, aligned with its work, the entries. None when there is nothing to compute.

        With many `unsent_tokens` no PREFILL request is started: its KV would only wait behind them.
        """
        draft = _Draft(fence)
        for entry in self._life.decoding:
            if entry.queue is self._life.decoding and not entry.ends_by_itself(self._context_tokens):
                self._decode(entry, draft, now_s)
        self._start_ready(draft, now_s)
        budget = self._config.step_tokens - draft.tokens
        self._admit(budget, now_s, congested=unsent_tokens > self._config.unsent_steps * self._config.step_tokens)
        self._prefill(draft, budget, now_s)
        return draft.finish(number)

    def table_pages(self, entry: Entry) -> int:
        """Pages to lease at admission: the whole prompt; all pages to the very end when preemption is used up."""
        request, page = entry.request, self._config.page_tokens
        tokens = len(request.tokens)
        if request.mode is not Mode.PREFILL and request.preemptions >= self._config.preemption_limit:
            # The last token's KV is never written: nothing follows it.
            tokens = max(tokens, policy.longest_tokens(request, self._context_tokens) - 1)
        return -(-tokens // page)

    def admissible(self, entry: Entry) -> tuple[Match, int] | None:
        """Prefix match and table size, if the pages can be had now with head-room for those who run already.

        At least the last token is computed, so that there are logits to sample: a full hit stops one page short.
        """
        life, request = self._life, entry.request
        page = self._config.page_tokens
        match = life.cache.match(entry.hash_pages(len(request.tokens) - 1, page))
        pages = self.table_pages(entry)
        # One page for each request that may cross a page border soon. Alone, all is yours.
        alone = life.cache.counts().leased == 0
        holders = (life.decoding, life.ready, life.staged, life.filling, life.filled)
        growing = (request.mode is not Mode.PREFILL) + sum(map(len, holders))
        spare = 0 if alone else growing
        return (match, pages) if life.cache.fits(match, pages, spare) else None

    # ---- decodes --------------------------------------------------------------------------------------------------
    def _decode(self, entry: Entry, draft: _Draft, now_s: float) -> None:
        start = entry.length - 1
        if not self._reach(entry, start + 1, now_s):
            return
        # The device holds the newest token unless it came from elsewhere, with the row or after all steps.
        known = () if entry.pending else (entry.request.tokens[-1],)
        draft.add(entry, start=start, count=1, sample=True, input_ids=known)

    def _start_ready(self, draft: _Draft, now_s: float) -> None:
        """READY requests wait for pages as long as anybody computes; only then they take them from each other."""
        life = self._life
        for entry in life.ready:
            if not life.free_rows:
                return
            if entry.queue is not life.ready or not self._reach(entry, entry.length, now_s, preempt=not draft.tokens):
                continue
            life.take_row(entry)
            entry.request.advance(Phase.RUNNING, now_s)
            life.decoding.add(entry)
            self._decode(entry, draft, now_s)

    def _reach(self, entry: Entry, tokens: int, now_s: float, *, preempt: bool = True) -> bool:
        """Pages for positions [0, tokens), preempting others if it must. False: not in this step, or preempted."""
        life, lease = self._life, entry.lease
        assert lease is not None, "a request without pages is in no decoding queue"
        missing = -(-tokens // self._config.page_tokens) - len(lease.pages)
        while missing > 0 and not life.cache.grow(lease, missing):
            ending = any(other.ends_by_itself(self._context_tokens) for other in life.decoding)
            if ending or life.pages_coming() or self._sharing.holding or not preempt:
                return False
            victim = self._victim(entry)
            life.preempt(victim, now_s)
            if victim is entry:
                return False
        return True

    def _victim(self, needy: Entry) -> Entry:
        """The last in order that may lose its pages; never one before `needy`, which may lose its own.

        Who has used up its preemptions holds all its pages, so a needy one is never capped.
        """
        life = self._life
        limit = self._config.preemption_limit
        candidates = [
            entry
            for queue in (life.decoding, life.prefilling, life.ready)
            for entry in queue
            if entry.request.mode is not Mode.PREFILL and entry.request.preemptions < limit
        ]
        return max(candidates, key=lambda entry: entry.order, default=needy)

    # ---- prefills -------------------------------------------------------------------------------------------------
    def _admit(self, budget: int, now_s: float, *, congested: bool) -> None:
        """Move requests to the rows: first those that hold pages already, then the waiting ones.

        Who does not fit is skipped, until it has waited `patience_s`.
        """
        life = self._life
        intake = _Intake(self._config, budget, [entry.remaining for entry in life.prefilling])
        self.crowded = self.held_back = False
        for entry in life.filled:
            if not life.free_rows or intake.full:
                return
            if not self._holds_back(entry, congested) and intake.takes(entry.remaining):
                self._start(entry, now_s)
        for scanned, entry in enumerate(life.waiting):
            if not life.free_rows or intake.full or scanned >= self._config.scan_limit:
                return
            if self._holds_back(entry, congested):
                continue
            found = self.admissible(entry)
            if found is None:
                if now_s - entry.queued_s >= self._config.patience_s:
                    self.crowded = True
                    return
                continue
            match, pages = found
            remaining = len(entry.request.tokens) - len(match.pages) * self._config.page_tokens
            fills = self._filling.wanted(entry, match)
            if not intake.takes(remaining, later=fills):
                continue
            self._sharing.lease(entry, match, pages)
            if fills:
                self._filling.begin(entry, now_s)
            else:
                self._start(entry, now_s)

    def _holds_back(self, entry: Entry, congested: bool) -> bool:
        held_back = congested and entry.request.mode is Mode.PREFILL
        self.held_back |= held_back
        return held_back

    def _start(self, entry: Entry, now_s: float) -> None:
        """It has its pages; KV of [0, planned) is in them."""
        life, request, lease = self._life, entry.request, entry.lease
        assert lease is not None, "leased just now, or before it was filled"
        request.advance(Phase.PREFILLING, now_s)
        life.take_row(entry)
        life.prefilling.add(entry)
        if request.mode is Mode.PREFILL:
            entry.announced = True
            life.outbox.append(
                PrefillAdmitted(request=request, pages=tuple(lease.pages), computed_tokens=entry.planned)
            )

    def _prefill(self, draft: _Draft, budget: int, now_s: float) -> None:
        life = self._life
        order = sorted(life.prefilling, key=lambda entry: policy.prefill_order(entry, now_s))
        wants = [(entry.planned, entry.remaining) for entry in order]
        for entry, count in zip(order, policy.share_out(wants, budget, self._config.page_tokens), strict=True):
            if not count:
                continue
            start, last = entry.planned, count == entry.remaining
            ids = tuple(entry.request.tokens[start : start + count])
            draft.add(entry, start=start, count=count, sample=last, input_ids=ids)
            if last and entry.request.mode is Mode.PREFILL:
                life.prefilling.remove(entry)  # keeps its row until its token is collected
            elif last:
                life.decoding.add(entry)


class _Intake:
    """How many prefills one plan starts."""

    def __init__(self, config: SchedulerConfig, budget: int, active: list[int]) -> None:
        self._page = config.page_tokens
        self._short = max(config.page_tokens, config.step_tokens // config.partial_prefills)
        self._long_left = config.partial_prefills - sum(remaining > self._short for remaining in active)
        # Each prefill in progress gets a page per step at the least; more of them would only hold pages.
        self._tokens_left = budget - sum(min(remaining, self._page) for remaining in active)

    @property
    def full(self) -> bool:
        return self._tokens_left <= 0

    def takes(self, remaining: int, *, later: bool = False) -> bool:
        """One more with so many tokens to compute, not in this step if `later`; False: enough long ones are there."""
        long = remaining > self._short
        if long and self._long_left <= 0:
            return False
        if not later:
            self._tokens_left -= min(remaining, self._page)
            self._long_left -= long
        return True


class _Draft:
    """A plan being written."""

    def __init__(self, fence: StepFence) -> None:
        self.tokens = 0
        self._fence = fence
        self._admissions: list[RowAdmission] = []
        self._work: list[RowWork] = []
        self._entries: list[Entry] = []

    def add(self, entry: Entry, *, start: int, count: int, sample: bool, input_ids: tuple[int, ...]) -> None:
        request, row, lease = entry.request, entry.row, entry.lease
        assert row is not None, "work needs a row"
        assert lease is not None, "work needs pages"
        if not entry.row_told:
            entry.row_told = True
            self._admissions.append(
                RowAdmission(
                    request_id=request.request_id,
                    row=row,
                    sampling=request.sampling,
                    tokens=tuple(request.tokens),
                    prompt_tokens=request.prompt_tokens,
                )
            )
        fresh: tuple[PageId, ...] = tuple(lease.pages[entry.table_told :])
        self._work.append(
            RowWork(
                request_id=request.request_id,
                row=row,
                start=start,
                count=count,
                sample=sample,
                output_position=request.output_tokens + entry.pending,
                input_ids=input_ids,
                first_new_page=entry.table_told,
                new_pages=fresh,
            )
        )
        self._entries.append(entry)
        self.tokens += count
        entry.table_told += len(fresh)
        entry.planned = start + count
        entry.pending += sample
        entry.open_steps += 1
        entry.last_step = self._fence

    def finish(self, number: int) -> tuple[StepPlan, list[Entry]] | None:
        if not self._work:
            return None
        form = Form.DECODE if all(item.count == 1 for item in self._work) else Form.RAGGED
        plan = StepPlan(number=number, form=form, admissions=tuple(self._admissions), work=tuple(self._work))
        return plan, self._entries
