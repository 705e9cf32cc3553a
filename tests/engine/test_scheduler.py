"""Scheduler: what one step holds, and in which order requests get there."""

from __future__ import annotations

import pytest
from support.schedule_world import EOS, World, make_config, make_request

from baton_common.errors import ErrorKind
from baton_common.ids import RequestId
from baton_engine.request import FinishReason, Mode, Phase, SamplingParams
from baton_engine.step import Form, StepPlan

R = RequestId("r")


def ids(first: int, count: int) -> list[int]:
    """A prompt that shares no page with prompts of another `first`."""
    return [first, *(2 + index % 40 for index in range(count - 1))]


def work(plan: StepPlan | None) -> dict[str, tuple[int, int]]:
    """request -> (start, count)"""
    assert plan is not None
    return {item.request_id: (item.start, item.count) for item in plan.work}


def endless(max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def test_one_request_gives_the_reference_tokens_and_ends_once() -> None:
    world = World(make_config())
    request = make_request("r", ids(5, 10), sampling=endless(6))
    world.submit(request)
    world.settle()
    world.check_end()
    assert request.output_tokens == 6
    assert world.outputs[R][-1].finish is FinishReason.LENGTH
    edges = [Phase.QUEUED, Phase.PREFILLING, Phase.RUNNING, Phase.FINISHED, Phase.FENCING, Phase.FREED]
    assert list(request.stamps) == edges
    assert list(request.stamps.values()) == sorted(request.stamps.values())


def test_a_stop_token_ends_it_and_the_overrun_token_is_dropped() -> None:
    prompt = next(ids(first, 9) for first in range(500) if _reference_stops_early(ids(first, 9)))
    world = World(make_config())
    world.submit(make_request("r", prompt, max_tokens=40))
    world.settle()
    world.check_end()
    last = world.outputs[R][-1]
    assert (last.token_id, last.finish) == (EOS, FinishReason.STOP)
    assert world.plans[-1].work[0].output_position == last.position + 1, "the overrun was computed"


def _reference_stops_early(prompt: list[int]) -> bool:
    world = World(make_config())
    world.submit(make_request("r", prompt, max_tokens=40))
    return len(world.expected[R]) < 10


def test_the_step_after_a_sample_takes_its_token_from_the_device() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), sampling=endless()))
    first, second = world.plan(), world.plan()
    assert first is not None
    assert second is not None
    assert first.work[0].input_ids == tuple(ids(5, 6))
    assert first.work[0].sample
    assert (second.work[0].input_ids, second.work[0].start) == ((), 6)
    assert (first.work[0].output_position, second.work[0].output_position) == (0, 1)


def test_an_ending_that_the_host_knows_has_no_overrun() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), sampling=endless(2)))
    assert world.plan() is not None
    assert world.plan() is not None
    assert world.plan() is None, "two tokens are on the way, no third is wanted"
    world.settle()
    world.check_end()


def test_a_sequence_that_fills_the_context_ends_there() -> None:
    world = World(make_config(context_tokens=12))
    request = make_request("r", ids(5, 9), sampling=endless())
    world.submit(request)
    world.settle()
    world.check_end()
    assert len(request.tokens) == 12
    assert world.outputs[R][-1].finish is FinishReason.LENGTH


def test_a_pool_smaller_than_the_context_is_the_context() -> None:
    world = World(make_config(total_pages=3))
    assert world.scheduler.context_tokens == 12
    request = make_request("r", ids(5, 9), sampling=endless())
    world.submit(request)
    world.settle()
    world.check_end()
    assert len(request.tokens) == 12


def test_admission_tells_the_runner_row_tokens_and_pages_once() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 24), sampling=endless()))
    first, second = world.plan(), world.plan()
    assert first is not None
    assert second is not None
    assert [admission.tokens for admission in first.admissions] == [tuple(ids(5, 24))]
    assert (first.work[0].first_new_page, len(first.work[0].new_pages)) == (0, 6)
    assert second.admissions == ()
    assert (second.work[0].first_new_page, second.work[0].new_pages) == (6, ())


def test_a_long_prompt_is_computed_in_chunks_of_whole_pages() -> None:
    world = World(make_config(step_tokens=10))
    world.submit(make_request("r", ids(5, 21)))
    chunks = [work(world.plan())["r"] for _ in range(3)]
    assert chunks == [(0, 8), (8, 8), (16, 5)]
    assert [plan.work[0].sample for plan in world.plans] == [False, False, True]


def test_decodes_and_prefill_chunks_share_a_step_and_decodes_never_wait() -> None:
    world = World(make_config(step_tokens=16))
    world.submit(make_request("d", ids(5, 4), sampling=endless()))
    world.iterate()
    world.iterate()
    world.submit(make_request("p", ids(6, 60), sampling=endless()))
    for _ in range(4):
        plan = world.iterate()
        assert plan is not None
        assert plan.form is Form.RAGGED
        assert [item.request_id for item in plan.work] == ["d", "p"]
        assert plan.work[0].count == 1
        assert 12 <= plan.tokens <= 16


def test_forms_are_decode_when_every_row_has_one_token_and_ragged_otherwise() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), sampling=endless(3)))
    world.settle()
    assert [plan.form for plan in world.plans] == [Form.RAGGED, Form.DECODE, Form.DECODE]


def test_short_requests_overtake_a_long_prefill() -> None:
    world = World(make_config(step_tokens=16, total_pages=64, context_tokens=200))
    world.submit(make_request("long", ids(5, 160)))
    world.iterate()
    for index in range(3):
        world.submit(make_request(f"short{index}", ids(6 + index, 6), max_tokens=2))
    world.settle()
    world.check_end()
    long = world.requests[RequestId("long")]
    for index in range(3):
        assert world.requests[RequestId(f"short{index}")].stamps[Phase.FREED] < long.stamps[Phase.RUNNING]


def test_of_two_prompts_that_arrived_together_the_short_one_goes_first() -> None:
    world = World(make_config(step_tokens=8))
    world.submit(make_request("long", ids(5, 40)))
    world.submit(make_request("short", ids(6, 6)))
    plan = world.plan()
    assert plan is not None
    assert [(item.request_id, item.count) for item in plan.work] == [("short", 4), ("long", 4)]


def test_no_more_prompts_are_started_than_can_advance_by_a_page_each_step() -> None:
    world = World(make_config(step_tokens=8, rows=8))
    for name in "abcd":
        world.submit(make_request(name, ids(ord(name), 6)))
    world.plan()
    assert world.in_phase(Phase.PREFILLING) == ["a", "b"]


def test_a_long_prefill_finishes_under_a_steady_stream_of_short_ones() -> None:
    world = World(make_config(step_tokens=16, total_pages=64, context_tokens=200))
    long = make_request("long", ids(5, 80), max_tokens=1)
    world.submit(long)
    for index in range(60):
        world.submit(make_request(f"s{index}", ids(100 + index, 12), max_tokens=1))
        world.iterate()
    assert long.phase is Phase.FREED


def test_a_prompt_that_waited_goes_before_newer_ones_of_its_size() -> None:
    world = World(make_config(step_tokens=8, rows=4))
    world.submit(make_request("old", ids(5, 24)))
    world.iterate(seconds=1.0)
    world.submit(make_request("new", ids(6, 16)))
    plan = world.iterate()
    assert [item.request_id for item in plan.work] == ["old", "new"] if plan else False


def test_not_more_long_prefills_than_allowed_but_short_ones_pass() -> None:
    world = World(make_config(step_tokens=32, partial_prefills=2, rows=8, total_pages=200))
    for name in "abc":
        world.submit(make_request(name, ids(ord(name), 60)))
    world.submit(make_request("s", ids(5, 6)))
    assert set(work(world.plan())) == {"a", "b", "s"}


def test_priority_goes_first_then_arrival() -> None:
    world = World(make_config(rows=1))
    for name, priority in (("low", 0), ("high", 5), ("late", 5)):
        world.submit(make_request(name, ids(ord(name[0]), 6), priority=priority))
    world.settle()
    world.check_end()
    assert list(world.ended) == ["high", "late", "low"]


def test_who_does_not_fit_is_skipped_until_its_patience_ends() -> None:
    world = World(make_config(total_pages=12, rows=8, patience_s=5.0))
    world.submit(make_request("running", ids(5, 16), sampling=endless(16)))
    world.iterate()
    world.submit(make_request("big", ids(6, 38), max_tokens=2))
    world.submit(make_request("small", ids(7, 4), max_tokens=1))
    world.iterate()
    assert world.requests[RequestId("big")].phase is Phase.QUEUED
    assert world.requests[RequestId("small")].phase is Phase.PREFILLING
    world.iterate(seconds=5.0)
    world.submit(make_request("later", ids(8, 4), max_tokens=1))
    world.iterate()
    assert world.requests[RequestId("later")].phase is Phase.QUEUED
    world.settle()
    world.check_end()
    big, later = world.requests[RequestId("big")], world.requests[RequestId("later")]
    assert big.stamps[Phase.PREFILLING] <= later.stamps[Phase.PREFILLING]


def test_the_scan_for_somebody_who_fits_is_bounded() -> None:
    world = World(make_config(total_pages=12, rows=8, scan_limit=2, patience_s=100.0))
    world.submit(make_request("running", ids(5, 16), sampling=endless(16)))
    world.iterate()
    for name in ("big1", "big2"):
        world.submit(make_request(name, ids(ord(name[3]), 38)))
    world.submit(make_request("small", ids(7, 4)))
    world.iterate()
    assert world.requests[RequestId("small")].phase is Phase.QUEUED


def test_a_repeated_prompt_is_not_computed_again_but_its_last_token_is() -> None:
    world = World(make_config())
    world.submit(make_request("first", ids(5, 16), max_tokens=1))
    world.settle()
    again = make_request("again", ids(5, 16), max_tokens=1)
    world.submit(again)
    plan = world.plan()
    assert work(plan) == {"again": (12, 4)}, "a full hit stops one page short: somebody must make the logits"
    world.settle()
    world.check_end()
    assert again.cached_tokens == 12
    assert [token.cached_tokens for token in world.outputs[RequestId("again")]] == [12]


def test_the_next_turn_finds_the_outputs_of_the_last_one() -> None:
    world = World(make_config())
    first = make_request("first", ids(5, 10), sampling=endless(11))
    world.submit(first)
    world.settle()
    second = make_request("second", [*first.tokens, 9, 9], max_tokens=1)
    world.submit(second)
    world.settle()
    world.check_end()
    assert second.cached_tokens == 20, "21 tokens, the KV of the last was never written: 5 full pages"


def test_other_salts_share_nothing() -> None:
    world = World(make_config())
    for salt in ("", "tenant-a", "tenant-b"):
        request = make_request(f"r{salt}", ids(5, 16), max_tokens=1, salt=salt)
        world.submit(request)
        world.settle()
        assert request.cached_tokens == 0
    assert world.scheduler.load().pages.cached == 12


def test_pages_are_shared_only_after_their_step_was_collected() -> None:
    world = World(make_config(rows=2, step_tokens=32))
    world.submit(make_request("a", ids(5, 16), max_tokens=1))
    world.plan()
    world.submit(make_request("b", ids(5, 16), max_tokens=1))
    assert work(world.plan()) == {"b": (0, 16)}
    world.settle()
    world.check_end()
    assert world.scheduler.load().pages.cached == 4, "the second copy of each page was freed"


def test_a_request_that_comes_with_outputs_goes_on_behind_them() -> None:
    whole = World(make_config())
    whole.submit(make_request("r", ids(5, 9), sampling=endless(8)))
    whole.settle()
    tokens = [token.token_id for token in whole.outputs[R]]
    moved = World(make_config())
    moved.submit(make_request("r", [*ids(5, 9), *tokens[:3]], prompt_tokens=9, sampling=endless(8)))
    moved.settle()
    moved.check_end()
    assert [token.token_id for token in moved.outputs[R]] == tokens[3:]
    assert [token.position for token in moved.outputs[R]] == [3, 4, 5, 6, 7]


def test_a_row_is_given_to_the_next_request_only_when_its_owner_ended() -> None:
    world = World(make_config(rows=1))
    world.submit(make_request("a", ids(5, 6), max_tokens=2))
    world.submit(make_request("b", ids(6, 6), max_tokens=2))
    world.settle()
    world.check_end()
    rows = [(item.request_id, item.row) for plan in world.plans for item in plan.admissions]
    assert rows == [("a", 0), ("b", 0)]


def test_load_tells_what_waits_runs_and_is_free() -> None:
    world = World(make_config(rows=1, step_tokens=8))
    world.submit(make_request("a", ids(5, 20)))
    world.submit(make_request("b", ids(6, 10)))
    world.plan()
    load = world.scheduler.load()
    assert (load.queued_requests, load.prefilling, load.running) == (1, 1, 0)
    assert load.queued_tokens == 10 + 12
    assert (load.free_pages, load.total_pages) == (32 - 5, 32)
    world.settle()
    load = world.scheduler.load()
    assert (load.submitted, load.ended, load.queued_tokens, load.free_pages) == (2, 2, 0, 32)


def test_steps_are_collected_in_the_order_they_were_planned() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 6), sampling=endless()))
    world.plan()
    world.plan()
    with pytest.raises(ValueError, match="step 2 is collected, 1 is the oldest"):
        world.scheduler.collect(2, [3], [], 1.0)


def test_an_idle_scheduler_lets_the_engine_sleep_until_something_happens() -> None:
    world = World(make_config())
    assert world.scheduler.sleep_s(1.0) is None
    world.submit(make_request("r", ids(5, 6), max_tokens=1, deadline_s=9.0))
    assert world.scheduler.sleep_s(1.0) == 0.0
    world.settle()
    assert world.scheduler.sleep_s(2.0) is None
    world.submit(make_request("held", ids(5, 9), mode=Mode.RESERVE, deadline_s=9.0))
    world.settle()
    assert world.scheduler.sleep_s(2.0) == pytest.approx(7.0)


def test_a_second_request_with_a_live_id_is_refused_and_the_first_goes_on() -> None:
    world = World(make_config())
    first, second = (make_request("r", ids(5, 6), max_tokens=3) for _ in range(2))
    world.scheduler.submit(first, 1.0)
    world.scheduler.submit(second, 1.0)
    (ended,) = world.scheduler.drain()
    assert ended.request is second  # type: ignore[union-attr]
    assert ended.error.kind is ErrorKind.INVALID  # type: ignore[union-attr]
    assert first.phase is Phase.QUEUED
