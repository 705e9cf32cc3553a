"""Scheduler: any sequence of events leaks no page, takes no undefined edge, and ends each request once, rightly.

Tiny pools force preemption, eviction and refusals. The world's device holds KV values per page slot, so foreign or
stale KV fails at once; outputs are compared with a reference that knows no scheduler.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.schedule_world import World, make_config, make_request

from baton_common.errors import ErrorKind
from baton_common.ids import RequestId
from baton_engine.request import Mode, Phase, SamplingParams

# What a request may end with here; INTERNAL would be a defect, INCOMPATIBLE and DRAINING are never asked for.
KINDS = {ErrorKind.INVALID, ErrorKind.OVERLOADED, ErrorKind.DEADLINE, ErrorKind.ABORTED, ErrorKind.TRANSFER}
BASES = [[7 * base + index * (base + 1) % 43 for index in range(64)] for base in range(1, 4)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        total_pages=st.sampled_from([6, 8, 12, 24]),
        rows=st.sampled_from([1, 2, 4, 8]),
        step_tokens=st.sampled_from([8, 11, 32]),
        context_tokens=st.sampled_from([20, 40, 96]),
        preemption_limit=st.integers(0, 2),
        partial_prefills=st.sampled_from([1, 3]),
        max_reserved=st.sampled_from([1, 4]),
        max_queued=st.sampled_from([2, 50]),
        patience_s=st.sampled_from([0.0, 0.05, 100.0]),
        scan_limit=st.sampled_from([1, 100]),
        max_filling=st.sampled_from([0, 1, 16]),
        slow_release=st.booleans(),
        reads=st.booleans(),
    )
    def start(self, slow_release: bool, reads: bool, **numbers: float) -> None:
        self.world = World(make_config(**numbers), slow_release=slow_release, reads=reads)

    @rule(
        mode=st.sampled_from([Mode.LOCAL, Mode.LOCAL, Mode.PREFILL, Mode.RESERVE]),
        base=st.sampled_from(BASES),
        shared=st.integers(0, 20),
        own=st.integers(1, 12),
        max_tokens=st.sampled_from([1, 2, 8, 30]),
        min_tokens=st.sampled_from([0, 3]),
        ignore_eos=st.booleans(),
        patience=st.sampled_from([0.0, 0.2, 1e6]),
        priority=st.sampled_from([0, 0, 0, 1]),
        local_below=st.sampled_from([0, 6]),
        follow=st.booleans(),
        fills=st.booleans(),
    )
    def submit(
        self,
        mode: Mode,
        base: list[int],
        shared: int,
        own: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        patience: float,
        priority: int,
        local_below: int,
        follow: bool,
        fills: bool,
    ) -> None:
        index = len(self.world.requests)
        start = base[:shared]
        if follow and index:
            # The next turn of a conversation: finds output pages in the tree.
            start = self.world.requests[RequestId(f"r{(shared + own) % index}")].tokens[:40]
        now_s = self.world.clock.now()
        self.world.submit(
            make_request(
                f"r{index}",
                [*start, *((index + 3 * step) % 47 for step in range(own))],
                mode=mode,
                sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos),
                deadline_s=now_s + patience,
                arrival_s=now_s,
                priority=priority,
                local_below=local_below,
                fills=fills,
            )
        )

    @rule(steps=st.integers(1, 6))
    def iterate(self, steps: int) -> None:
        for _ in range(steps):
            self.world.iterate()

    @rule()
    def plan_without_collecting(self) -> None:
        if len(self.world.launched) < 3:
            self.world.plan()

    @rule()
    def run_device(self) -> None:
        self.world.run_device()

    @rule(seconds=st.sampled_from([0.01, 0.3]))
    def wait(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @precondition(lambda self: self.world.requests)
    @rule(pick=st.integers(0, 999))
    def abort(self, pick: int) -> None:
        self.world.abort(RequestId(f"r{pick % len(self.world.requests)}"))

    def one_in(self, pick: int, *phases: Phase) -> RequestId | None:
        names = self.world.in_phase(*phases)
        return names[pick % len(names)] if names else None

    @rule(pick=st.integers(0, 99), pages=st.sampled_from([0, 1, 2, 99]))
    def fill(self, pick: int, pages: int) -> None:
        if names := self.world.filling():
            self.world.fill(names[pick % len(names)], pages)

    @rule(pick=st.integers(0, 99))
    def a_reader_ends(self, pick: int) -> None:
        if reading := self.world.readers.open:
            self.world.readers.finish(pick % len(reading))

    @rule(unsent_tokens=st.sampled_from([0, 1 << 20]))
    def network(self, unsent_tokens: int) -> None:
        self.world.unsent_tokens = unsent_tokens

    @rule(pick=st.integers(0, 99))
    def receiving(self, pick: int) -> None:
        if (name := self.one_in(pick, Phase.RESERVED)) is not None:
            self.world.receiving(name)

    @rule(pick=st.integers(0, 99))
    def receive(self, pick: int) -> None:
        if (name := self.one_in(pick, Phase.RESERVED, Phase.RECEIVING)) is not None:
            self.world.receive(name)

    @rule(pick=st.integers(0, 99))
    def lose_the_sender(self, pick: int) -> None:
        if (name := self.one_in(pick, Phase.RESERVED, Phase.RECEIVING)) is not None:
            self.world.fail_kv(name)

    @rule(pick=st.integers(0, 99), ok=st.booleans())
    def hand_off(self, pick: int, ok: bool) -> None:
        if (name := self.one_in(pick, Phase.SENDING)) is not None:
            self.world.hand_off(name, ok=ok)

    @rule(pick=st.integers(0, 99))
    def the_role_answers(self, pick: int) -> None:
        if names := self.world.unanswered:
            self.world.answer_release(names[pick % len(names)])

    @rule(pick=st.integers(0, 99))
    def last_gather_or_scatter_ends(self, pick: int) -> None:
        if names := self.world.fences():
            self.world.finish_fence(names[pick % len(names)])

    @invariant()
    def nothing_leaks(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.bring_home()
        self.world.check_end()
        assert {error.kind for error in self.world.ended.values() if error} <= KINDS


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_a_busy_hour_in_a_small_pool(seed: int) -> None:
    """Only load, no faults: everybody who is not refused gets all tokens, whatever it takes."""
    draw = random.Random(seed)
    config = make_config(total_pages=20, rows=8, step_tokens=24, context_tokens=60, max_reserved=3)
    world = World(config, reads=bool(seed % 2))
    for index in range(60):
        base = draw.choice(BASES)[: draw.randrange(0, 30)]
        mode = draw.choice([Mode.LOCAL, Mode.LOCAL, Mode.LOCAL, Mode.RESERVE, Mode.PREFILL])
        tokens = [*base, *(draw.randrange(50) for _ in range(draw.randrange(1, 10)))]
        sampling = SamplingParams(max_tokens=draw.choice([1, 5, 20, 25]), ignore_eos=True)
        world.submit(make_request(f"r{index}", tokens, mode=mode, sampling=sampling, fills=index % 3 == 0))
        for _ in range(draw.randrange(0, 4)):
            world.iterate()
        if index % 8 == 7:
            world.bring_home()
        world.check()
    world.bring_home()
    world.check_end()
    assert {error.kind for error in world.ended.values() if error} <= {ErrorKind.OVERLOADED}
    assert sum(error is None for error in world.ended.values()) >= 50
    assert world.preempted
    assert max(world.preempted.count(name) for name in world.preempted) <= 2
