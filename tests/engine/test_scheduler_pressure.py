"""Scheduler under pressure: preemption, deadlines, aborts, full queues. Everybody gets an answer."""

from __future__ import annotations

import pytest
from support.schedule_world import World, make_config, make_request

from baton_common.errors import Draining, ErrorKind
from baton_common.ids import RequestId
from baton_engine.request import Mode, Phase, SamplingParams
from baton_engine.sched.records import Preempted


def ids(first: int, count: int) -> list[int]:
    return [first, *(2 + index % 40 for index in range(count - 1))]


def endless(max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def growing(world: World, names: str, *, prompt: int = 7, outputs: int = 40) -> None:
    for name in names:
        world.submit(make_request(name, ids(ord(name), prompt), sampling=endless(outputs)))


def test_the_newest_loses_its_pages_when_an_older_one_needs_them() -> None:
    world = World(make_config(total_pages=12))
    growing(world, "abc", outputs=20)
    world.settle()
    world.check_end()
    assert world.preempted
    assert world.preempted[0] == "c"
    assert "a" not in world.preempted
    assert all(error is None for error in world.ended.values())


def test_the_lowest_priority_loses_its_pages_first() -> None:
    world = World(make_config(total_pages=12))
    world.submit(make_request("batch", ids(5, 7), sampling=endless(20), priority=-1))
    growing(world, "ab", outputs=20)
    world.settle()
    world.check_end()
    assert world.preempted[0] == "batch"


def test_a_preempted_request_keeps_its_tokens_and_its_prefix() -> None:
    world = World(make_config(total_pages=12))
    growing(world, "abc", outputs=20)
    while not world.preempted:
        world.iterate()
    victim = world.requests[world.preempted[0]]
    kept = victim.output_tokens
    world.settle()
    world.check_end()
    again = [item for plan in world.plans for item in plan.admissions if item.request_id == victim.request_id][1]
    assert len(again.tokens) >= victim.prompt_tokens + kept
    first = next(
        item
        for plan in world.plans
        for item in plan.work
        if item.request_id == victim.request_id and len(again.tokens) <= item.start + item.count and item.count > 1
    )
    assert first.start > 0, "its pages were still in the tree"
    positions = [token.position for token in world.outputs[victim.request_id]]
    assert positions == list(range(20)), "no output twice, none missing"


def test_nobody_is_preempted_more_often_than_allowed_and_all_finish() -> None:
    world = World(make_config(total_pages=14, rows=8, preemption_limit=2))
    growing(world, "abcdefgh", prompt=5, outputs=30)
    world.settle()
    world.check_end()
    assert all(error is None for error in world.ended.values())
    assert max(world.preempted.count(name) for name in world.preempted) <= 2
    assert world.scheduler.load().preemptions == len(world.preempted)


def test_who_used_up_its_preemptions_is_spared_although_it_is_the_newest() -> None:
    world = World(make_config(total_pages=20, rows=8, preemption_limit=1))
    growing(world, "a", prompt=7, outputs=20)
    growing(world, "b", prompt=3, outputs=36)
    for _ in range(4):
        world.iterate()
    growing(world, "c", prompt=11, outputs=12)
    growing(world, "d", prompt=7, outputs=36)
    world.settle()
    world.check_end()
    assert world.preempted == ["d", "b"]


def test_admission_leaves_a_page_for_each_that_decodes() -> None:
    world = World(make_config(total_pages=8))
    growing(world, "a", prompt=7)
    world.iterate()
    world.submit(make_request("b", ids(6, 24)))
    world.iterate()
    assert world.requests[RequestId("b")].phase is Phase.QUEUED
    assert world.scheduler.load().free_pages == 6, "enough for the prompt, not for what follows"


def test_without_preemption_everybody_gets_all_pages_at_admission() -> None:
    world = World(make_config(total_pages=14, rows=8, preemption_limit=0))
    growing(world, "abcd", prompt=5, outputs=30)
    world.settle()
    world.check_end()
    assert not world.preempted
    assert all(len(plan.work[0].new_pages) in (0, 9) for plan in world.plans)


def test_a_request_whose_end_is_known_is_waited_for_and_not_preempted() -> None:
    world = World(make_config(total_pages=10))
    growing(world, "abc", prompt=7, outputs=8)
    world.settle()
    world.check_end()
    assert not world.preempted


def test_the_token_in_flight_of_a_preempted_request_is_not_lost() -> None:
    world = World(make_config(total_pages=12))
    growing(world, "abc", outputs=20)
    while not world.preempted:
        world.collect()
        world.plan()
        world.plan()
    name = world.preempted[0]
    before = len(world.outputs[name])
    in_flight = sum(item.request_id == name for step in world.launched for item in step.plan.work if item.sample)
    assert in_flight
    assert world.requests[name].phase is Phase.PREEMPTED
    while world.launched:
        world.collect()
    assert len(world.outputs[name]) == before + in_flight


def test_a_preemption_record_says_how_much_was_lost() -> None:
    world = World(make_config(total_pages=12))
    growing(world, "abc", outputs=20)
    lost: list[int] = []
    drain = world.scheduler.drain

    def spy() -> list[object]:
        outcomes = drain()
        lost.extend(outcome.lost_tokens for outcome in outcomes if isinstance(outcome, Preempted))
        return outcomes  # type: ignore[return-value]

    world.scheduler.drain = spy  # type: ignore[method-assign, assignment]
    world.settle()
    assert lost
    assert all(0 <= tokens <= 2 * world.config.page_tokens for tokens in lost), "full pages stay in the tree"


def test_handoffs_in_progress_are_never_preempted() -> None:
    world = World(make_config(total_pages=16, rows=8))
    world.submit(make_request("sent", ids(5, 9), mode=Mode.PREFILL))
    world.submit(make_request("held", ids(6, 9), mode=Mode.RESERVE))
    growing(world, "abc", outputs=24)
    world.bring_home()
    world.check_end()
    assert world.preempted
    assert not {"sent", "held"} & set(world.preempted)


def test_a_prompt_that_is_computed_for_a_handover_is_not_preempted() -> None:
    world = World(make_config(total_pages=21, rows=4, step_tokens=6))
    growing(world, "ab", outputs=24)
    for _ in range(12):
        world.iterate()
    sent = make_request("sent", ids(5, 36), mode=Mode.PREFILL)
    world.submit(sent)
    for _ in range(8):
        world.iterate()
    assert sent.phase is Phase.PREFILLING
    assert world.preempted == ["b"]
    world.bring_home()
    world.check_end()


@pytest.mark.parametrize(
    ("phase", "mode"),
    [
        (Phase.QUEUED, Mode.LOCAL),
        (Phase.PREFILLING, Mode.LOCAL),
        (Phase.RUNNING, Mode.LOCAL),
        (Phase.SENDING, Mode.PREFILL),
        (Phase.RESERVED, Mode.RESERVE),
        (Phase.RECEIVING, Mode.RESERVE),
    ],
)
def test_a_passed_deadline_ends_the_request_and_names_the_phase(phase: Phase, mode: Mode) -> None:
    world = World(make_config(rows=1, step_tokens=8))
    request = make_request("r", ids(6, 20), mode=mode, deadline_s=50.0, sampling=endless())
    if phase is Phase.QUEUED:
        growing(world, "a")
        world.iterate()
    world.submit(request)
    if phase is Phase.RECEIVING:
        world.receiving(request.request_id)
    for _ in range(8):
        if request.phase is not phase:
            world.iterate()
    assert request.phase is phase
    world.clock.advance(50.0)
    world.bring_home()
    world.check_end()
    error = world.ended[request.request_id]
    assert error is not None
    assert error.kind is ErrorKind.DEADLINE
    assert f"in phase {phase.value}" in str(error)


def test_a_deadline_that_passed_before_arrival_is_refused() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), deadline_s=0.5))
    error = world.ended[RequestId("r")]
    assert error is not None
    assert error.kind is ErrorKind.DEADLINE


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    world = World(make_config(rows=1, max_queued=2))
    growing(world, "abcd", outputs=4)
    error = world.ended[RequestId("c")]
    assert error is not None
    assert error.kind is ErrorKind.OVERLOADED
    assert "2 requests wait already" in str(error)
    assert error.retry_after_ms > 0
    world.settle()
    world.check_end()


def test_what_can_never_run_is_refused_at_once() -> None:
    world = World(make_config(total_pages=4))
    world.submit(make_request("r", ids(5, 16)))
    error = world.ended[RequestId("r")]
    assert error is not None
    assert (error.kind, error.param) == (ErrorKind.INVALID, "prompt")
    assert "16 tokens do not fit the KV pool of 16 tokens" in str(error)


def test_an_abort_ends_a_running_request_only_after_its_step() -> None:
    world = World(make_config())
    growing(world, "a")
    world.plan()
    world.abort(RequestId("a"))
    world.scheduler.retire(world.clock.now())
    world.deliver()
    assert not world.ended, "the step still touches the pages"
    assert world.scheduler.load().pages.in_flight == 2
    assert world.scheduler.load().fencing == 1
    world.run_device()
    world.scheduler.retire(world.clock.now())
    world.deliver()
    error = world.ended[RequestId("a")]
    assert error is not None
    assert error.kind is ErrorKind.ABORTED
    assert world.scheduler.load().pages.free == 32
    world.settle()
    world.check_end()


def test_events_for_requests_that_are_gone_are_ignored() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), max_tokens=1))
    world.settle()
    for name in ("r", "never seen"):
        world.abort(RequestId(name))
        world.receiving(RequestId(name))
        world.fail_kv(RequestId(name))
        world.hand_off(RequestId(name))
        world.hand_off(RequestId(name), ok=False)
        world.scheduler.kv_received(RequestId(name), 3, None, 1.0)
    world.check_end()


def test_shutdown_ends_everything_with_its_error() -> None:
    world = World(make_config(rows=2))
    growing(world, "abc")
    world.submit(make_request("held", ids(5, 9), mode=Mode.RESERVE))
    world.iterate()
    world.scheduler.abort_all(Draining("the worker stops"), world.clock.now())
    world.deliver()
    world.bring_home()
    world.check_end()
    assert {error.kind for error in world.ended.values() if error} == {ErrorKind.DRAINING}
    assert len(world.ended) == 4
