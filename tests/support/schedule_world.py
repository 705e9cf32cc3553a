"""A world around one Scheduler: a fake device, a fake peer and the clients, all driven by the test.

The device keeps "KV" per page slot: a chain value over all tokens before, so a page that is reused too early, a wrong
page table or a wrong prefix hit shows up as wrong KV, not only as a count. A token is a function of the chain alone:
whatever the batching, chunking, preemption or prefix hits, outputs must equal `reference`.
Steps run in order, but only when the test says so; the peer scatters into pages until its fence is done, as late as it
may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from support.schedule_readers import Readers

from baton_common.clock import ManualClock
from baton_common.errors import Aborted, BatonError, ErrorKind
from baton_common.hashing import page_hashes, salted_root
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_engine.request import FinishReason, Mode, Phase, Request, SamplingParams
from baton_engine.role import TokenOut
from baton_engine.sched import records
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.policy import finish_reason
from baton_engine.sched.scheduler import Scheduler
from baton_engine.step import Form, StepPlan

ROOT = b"\x07" * 16
VOCAB = 50
EOS = 1
GARBAGE = -1


def chain(before: int, token: int) -> int:
    return hash((before, token))


def chain_values(tokens: Sequence[int]) -> list[int]:
    """The KV of each position."""
    value, values = 0, []
    for token in tokens:
        value = chain(value, token)
        values.append(value)
    return values


def next_token(value: int) -> int:
    return value % VOCAB


def make_request(
    name: str,
    tokens: Sequence[int],
    *,
    mode: Mode = Mode.LOCAL,
    max_tokens: int = 4,
    deadline_s: float = 1e9,
    arrival_s: float = 0.0,
    priority: int = 0,
    salt: str = "",
    local_below: int = 0,
    prompt_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    fills: bool = False,
) -> Request:
    return Request(
        request_id=RequestId(name),
        mode=mode,
        tokens=list(tokens),
        prompt_tokens=len(tokens) if prompt_tokens is None else prompt_tokens,
        sampling=sampling or SamplingParams(max_tokens=max_tokens),
        deadline_s=deadline_s,
        arrival_s=arrival_s,
        priority=priority,
        cache_salt=salt,
        transfer_id=None if mode is Mode.LOCAL else TransferId(f"t-{name}"),
        local_below_tokens=local_below,
        fills=fills,
    )


def make_config(**changes: object) -> SchedulerConfig:
    numbers: dict[str, object] = {
        "total_pages": 32,
        "page_tokens": 4,
        "rows": 4,
        "step_tokens": 16,
        "context_tokens": 96,
        "hash_root": ROOT,
        "eos_token_ids": frozenset({EOS}),
    }
    return SchedulerConfig(**(numbers | changes))  # type: ignore[arg-type]


def reference(request: Request, context_tokens: int) -> list[int]:
    """Outputs that the request must get from where it is now, computed without any scheduler."""
    twin = make_request("twin", request.tokens, prompt_tokens=request.prompt_tokens, sampling=request.sampling)
    value = 0
    for token in twin.tokens:
        value = chain(value, token)
    outputs: list[int] = []
    while True:
        twin.tokens.append(next_token(value))
        outputs.append(twin.tokens[-1])
        value = chain(value, twin.tokens[-1])
        if finish_reason(twin, frozenset({EOS}), context_tokens) is not None:
            return outputs


@dataclass
class Flag:
    """A fence that the test completes."""

    up: bool = False

    def done(self) -> bool:
        return self.up


@dataclass
class Row:
    request_id: RequestId
    tokens: list[int]
    table: list[PageId] = field(default_factory=list)


@dataclass
class Launched:
    plan: StepPlan
    fence: Flag
    results: list[int] | None = None


@dataclass
class Handoff:
    """What the fake peer knows of one PREFILL or RESERVE request, or of any that is filled."""

    request: Request
    pages: tuple[PageId, ...]
    first_missing: int = 0
    filling: bool = False  # positions from first_missing on may be written until the fence
    received: bool = False
    frozen: dict[tuple[PageId, int], int] | None = None  # SENDING: what a late gather must still read
    fence: Flag | None = None


class World:
    def __init__(self, config: SchedulerConfig, *, slow_release: bool = False, reads: bool = False) -> None:
        self.config = config
        self.slow_release = slow_release  # the answer to a KvRelease takes its time
        self.unanswered: list[RequestId] = []
        self.clock = ManualClock(1.0)
        self.scheduler = Scheduler(config)
        self.kv: dict[tuple[PageId, int], int] = {}
        self.readers = Readers(config.hash_root, config.page_tokens, self.kv, chain_values)
        if reads:
            self.scheduler.tell_pages()
        self.unsent_tokens = 0  # what the network still has to carry
        self.rows: dict[int, Row] = {}
        self.launched: deque[Launched] = deque()
        self.plans: list[StepPlan] = []
        self.expected: dict[RequestId, list[int]] = {}
        self.outputs: dict[RequestId, list[TokenOut]] = {}
        self.ended: dict[RequestId, BatonError | None] = {}
        self.handoffs: dict[RequestId, Handoff] = {}
        self.local: set[RequestId] = set()
        self.done_prefills: set[RequestId] = set()
        self.preempted: list[RequestId] = []
        self.mirror: set[bytes] = set()  # of the prefix tree, from events alone
        self.requests: dict[RequestId, Request] = {}

    # ---- clients --------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        if request.prompt_tokens > 0 and len(request.tokens) < self.scheduler.context_tokens:
            self.expected[request.request_id] = reference(request, self.scheduler.context_tokens)
        self.scheduler.name_pages(request)
        self.scheduler.submit(request, self.clock.now())
        self.deliver()

    def abort(self, name: RequestId) -> None:
        self.scheduler.abort(name, Aborted("the client went away"), self.clock.now())
        self.deliver()

    # ---- engine ---------------------------------------------------------------------------------------------------
    def plan(self) -> StepPlan | None:
        self.scheduler.retire(self.clock.now())
        plan = self.scheduler.plan(self.clock.now(), unsent_tokens=self.unsent_tokens)
        self.deliver()
        if plan is not None:
            self._inspect(plan)
            self.plans.append(plan)
            self.launched.append(Launched(plan, Flag()))
            self.scheduler.launched(plan.number, self.launched[-1].fence)
        return plan

    def run_device(self) -> None:
        """The oldest step that did not run yet runs."""
        step = next((step for step in self.launched if step.results is None), None)
        if step is not None:
            step.results = self._execute(step.plan)
            step.fence.up = True

    def collect(self) -> None:
        if not self.launched:
            return
        if self.launched[0].results is None:
            self.run_device()
        step = self.launched.popleft()
        assert step.results is not None
        self.scheduler.collect(step.plan.number, step.results, [], self.clock.now())
        self.deliver()

    def iterate(self, seconds: float = 0.01) -> StepPlan | None:
        """One iteration of the engine thread: launch n+1, then collect n."""
        plan = self.plan()
        self.clock.advance(seconds)
        if len(self.launched) > 1 or plan is None:
            self.collect()
        return plan

    def settle(self, limit: int = 2000) -> None:
        """Run until nothing moves any more without the peer."""
        for _ in range(limit):
            if self.iterate() is None and not self.launched and self.scheduler.sleep_s(self.clock.now()) != 0:
                return
        raise AssertionError("the scheduler does not come to rest")

    # ---- who fills ------------------------------------------------------------------------------------------------
    def filling(self) -> list[RequestId]:
        """Requests that wait for the answer to on_fill."""
        return [name for name, handoff in self.handoffs.items() if handoff.filling and handoff.fence is None]

    def fill(self, name: RequestId, pages: int) -> None:
        """KV of so many more pages comes from elsewhere, or of as many as there are."""
        handoff, page = self.handoffs.pop(name), self.config.page_tokens
        tokens = handoff.request.tokens
        end = min(handoff.first_missing + pages * page, (len(tokens) - 1) // page * page)
        for position, value in enumerate(chain_values(tokens[:end])):
            if position >= handoff.first_missing:
                self.kv[self._slot(handoff.pages, position)] = value
        self.scheduler.kv_filled(name, end, self.clock.now())
        self.deliver()

    # ---- peer -----------------------------------------------------------------------------------------------------
    def receiving(self, name: RequestId) -> None:
        self.scheduler.kv_receiving(name, self.clock.now())
        self.deliver()

    def receive(self, name: RequestId) -> None:
        """All KV arrives; the sender made the next token."""
        handoff = self.handoffs[name]
        tokens = handoff.request.tokens
        value = 0
        for position, token in enumerate(tokens):
            value = chain(value, token)
            if position >= handoff.first_missing:
                self.kv[self._slot(handoff.pages, position)] = value
        handoff.received = True
        self.outputs[name].append(
            TokenOut(request_id=name, position=handoff.request.output_tokens, token_id=next_token(value))
        )
        self.scheduler.kv_received(name, next_token(value), None, self.clock.now())
        self.deliver()

    def fail_kv(self, name: RequestId) -> None:
        self.scheduler.kv_failed(name, BatonError("peer lost", kind=ErrorKind.TRANSFER), self.clock.now())
        self.deliver()

    def hand_off(self, name: RequestId, *, ok: bool = True) -> None:
        if ok:
            self.scheduler.handoff_done(name, self.clock.now())
        else:
            error = BatonError("peer lost", kind=ErrorKind.TRANSFER)
            self.scheduler.handoff_failed(name, error, self.clock.now())
        self.deliver()

    def finish_fence(self, name: RequestId) -> None:
        """The last gather or scatter of the transfer ends: it reads or writes right up to that moment."""
        handoff = self.handoffs.pop(name)
        assert handoff.fence is not None
        if handoff.frozen is not None:
            for slot, value in handoff.frozen.items():
                assert self.kv.get(slot) == value, f"{name}: page {slot[0]} changed under a gather"
        elif handoff.filling or (handoff.request.mode is Mode.RESERVE and not handoff.received):
            for position in range(handoff.first_missing, len(handoff.request.tokens)):
                self.kv[self._slot(handoff.pages, position)] = GARBAGE
        handoff.fence.up = True

    def answer_release(self, name: RequestId) -> None:
        self._answer(name)
        self.deliver()

    def _answer(self, name: RequestId) -> None:
        self.unanswered.remove(name)
        fence = self.handoffs[name].fence
        assert fence is not None
        self.scheduler.kv_released(name, fence, self.clock.now())

    def in_phase(self, *phases: Phase) -> list[RequestId]:
        return [name for name, request in self.requests.items() if request.phase in phases]

    def fences(self) -> list[RequestId]:
        """Transfers that were told to stop, and may still gather or scatter."""
        asked = [name for name, handoff in self.handoffs.items() if handoff.fence is not None]
        return [name for name in asked if name not in self.unanswered]

    # ---- outcomes -------------------------------------------------------------------------------------------------
    def deliver(self) -> None:
        while outcomes := self.scheduler.drain():
            for outcome in outcomes:
                self._handle(outcome)

    def _handle(self, outcome: records.Outcome) -> None:
        match outcome:
            case records.FillWanted(request=request, pages=pages, hashes=hashes, have_tokens=have):
                self._fill_wanted(request, pages, hashes, have)
            case records.PagesShared(hashes=hashes, pages=pages, hold=hold):
                hold.answer(self.readers.tell(hashes, pages, self.requests.values()))
            case records.Reserved(request=request, pages=pages, first_missing_token=first):
                assert first % self.config.page_tokens == 0
                assert first < len(request.tokens)
                assert len(pages) == -(-len(request.tokens) // self.config.page_tokens)
                self.handoffs[request.request_id] = Handoff(request, pages, first)
            case records.PrefillAdmitted(request=request, pages=pages, computed_tokens=computed):
                assert not self.congested, "prefill runs ahead of the network"
                self._verify(request.tokens[:computed], pages)
                self.handoffs[request.request_id] = Handoff(request, pages)
            case records.TurnedLocal(request=request):
                self.local.add(request.request_id)
            case records.Tokens(tokens=tokens):
                for token in tokens:
                    self._token(token)
            case records.PrefillDone(request=request, first=first):
                assert self.outputs[request.request_id][-1] == first
                handoff = self.handoffs[request.request_id]
                prompt = request.tokens[:-1]
                self._verify(prompt, handoff.pages)
                slots = [self._slot(handoff.pages, position) for position in range(len(prompt))]
                handoff.frozen = {slot: self.kv[slot] for slot in slots}
                self.done_prefills.add(request.request_id)
            case records.KvRelease(request=request):
                handoff = self.handoffs[request.request_id]
                assert handoff.fence is None, "released twice"
                handoff.fence = Flag()
                self.unanswered.append(request.request_id)
                if not self.slow_release:
                    self._answer(request.request_id)
            case records.KvEvents(stored=stored, removed=removed):
                assert not set(stored) & set(removed)
                assert not set(stored) & self.mirror
                assert set(removed) <= self.mirror
                self.mirror = (self.mirror | set(stored)) - set(removed)
            case records.Preempted(request=request):
                self.preempted.append(request.request_id)
            case records.Ended(request=request, error=error):
                assert request.request_id not in self.ended, "ended twice"
                assert request.phase is Phase.FREED
                assert request.request_id not in self.handoffs, "ended before its transfer was fenced"
                self.ended[request.request_id] = error

    @property
    def congested(self) -> bool:
        return self.unsent_tokens > self.config.unsent_steps * self.config.step_tokens

    def _fill_wanted(
        self, request: Request, pages: tuple[PageId, ...], hashes: tuple[PageHash, ...], have: int
    ) -> None:
        page, root = self.config.page_tokens, salted_root(self.config.hash_root, request.cache_salt)
        assert request.fills
        assert request.phase is Phase.FILLING
        assert list(hashes) == page_hashes(root, request.tokens[:-1], page)
        assert (have % page, len(pages)) == (0, -(-len(request.tokens) // page))
        assert have < len(hashes) * page, "nothing is missing that could be filled"
        self._verify(request.tokens[:have], pages)
        self.handoffs[request.request_id] = Handoff(request, pages, have, filling=True)

    def _token(self, token: TokenOut) -> None:
        assert token.request_id not in self.ended, "a token after the end"
        outputs = self.outputs[token.request_id]
        if token.finish is not None and outputs and outputs[-1].position == token.position:
            outputs.pop()  # the handed-over token ended the request: repeated once, with the reason
        assert not outputs or outputs[-1].finish is None
        outputs.append(token)

    # ---- device ---------------------------------------------------------------------------------------------------
    def _inspect(self, plan: StepPlan) -> None:
        rows = [work.row for work in plan.work]
        assert len(set(rows)) == len(rows), "a row twice in one step"
        assert plan.tokens <= self.config.step_tokens
        assert plan.number == len(self.plans) + 1
        assert (plan.form is Form.DECODE) == all(work.count == 1 for work in plan.work)
        assert {item.row for item in plan.admissions} <= set(rows)

    def _execute(self, plan: StepPlan) -> list[int]:
        for admission in plan.admissions:
            self.rows[admission.row] = Row(admission.request_id, list(admission.tokens))
        sampled: list[int] = []
        for work in plan.work:
            row = self.rows[work.row]
            assert row.request_id == work.request_id
            assert work.first_new_page == len(row.table)
            row.table.extend(work.new_pages)
            ids = work.input_ids or (row.tokens[-1],)
            assert len(ids) == work.count
            assert list(ids) == row.tokens[work.start : work.start + work.count]
            for position in range(work.start, work.start + work.count):
                before = self.kv[self._slot(row.table, position - 1)] if position else 0
                self.kv[self._slot(row.table, position)] = chain(before, row.tokens[position])
            if work.sample:
                assert work.start + work.count == len(row.tokens)
                row.tokens.append(next_token(self._verify(row.tokens, row.table)))
                sampled.append(row.tokens[-1])
        return sampled

    def _verify(self, tokens: Sequence[int], table: Sequence[PageId]) -> int:
        """The KV of `tokens` is in `table`; returns the last chain value."""
        value = 0
        for position, token in enumerate(tokens):
            value = chain(value, token)
            slot = self._slot(table, position)
            assert self.kv.get(slot) == value, f"position {position}: page {slot[0]} holds foreign KV"
        return value

    def _slot(self, table: Sequence[PageId], position: int) -> tuple[PageId, int]:
        return table[position // self.config.page_tokens], position % self.config.page_tokens

    # ---- judgement ------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """What must hold at any time."""
        self.scheduler.check()
        assert self.mirror == set(self.scheduler.cached_hashes())

    def check_answer(self, name: RequestId) -> None:
        """The request ended; its tokens are the reference's, all of them unless there is an error."""
        error = self.ended[name]
        outputs, expected = self.outputs[name], self.expected.get(name, [])
        base = self.requests[name].output_tokens - len(outputs)
        assert [token.position for token in outputs] == [base + index for index in range(len(outputs))]
        tokens = [token.token_id for token in outputs]
        assert tokens == expected[: len(tokens)]
        handed_off = Phase.HANDED_OFF in self.requests[name].stamps
        if error is None and not handed_off:
            assert tokens == expected
            assert outputs[-1].finish in (FinishReason.STOP, FinishReason.LENGTH)
        elif handed_off:
            assert len(tokens) == 1

    def check_end(self) -> None:
        """Everything was answered and nothing is held: call when the world is at rest."""
        assert set(self.ended) == set(self.requests)
        for name in self.requests:
            self.check_answer(name)
        self.check()
        pages = self.scheduler.load().pages
        assert (pages.leased, pages.in_flight) == (0, 0)
        assert pages.free + pages.cached == pages.total
        assert self.scheduler.sleep_s(self.clock.now()) is None

    def bring_home(self, limit: int = 400) -> None:
        """The peer, the network, readers and the device do all they owe."""
        self.unsent_tokens = 0
        for _ in range(limit):
            self.settle()
            for name in self.filling():
                self.fill(name, 1)
            while self.readers.open:
                self.readers.finish(0)
            for name in self.in_phase(Phase.RESERVED, Phase.RECEIVING):
                self.receive(name)
            for name in self.in_phase(Phase.SENDING):
                self.hand_off(name)
            for name in list(self.unanswered):
                self.answer_release(name)
            for name in self.fences():
                self.finish_fence(name)
            if len(self.ended) == len(self.requests):
                self.settle()
                return
            self.clock.advance(0.01)
        raise AssertionError(f"never answered: {sorted(set(self.requests) - set(self.ended))}")
