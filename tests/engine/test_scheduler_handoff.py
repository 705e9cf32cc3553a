"""Scheduler: PREFILL hands over, RESERVE receives; pages stay until nothing gathers or scatters."""

from __future__ import annotations

import pytest
from support.schedule_world import EOS, World, make_config, make_request, next_token, reference

from baton_common.errors import ErrorKind
from baton_common.ids import RequestId
from baton_engine.request import FinishReason, IllegalTransition, Mode, Phase, Request, SamplingParams

R = RequestId("r")


def ids(first: int, count: int) -> list[int]:
    return [first, *(2 + index % 40 for index in range(count - 1))]


def prefill(tokens: list[int], *, max_tokens: int = 8) -> Request:
    return make_request("r", tokens, mode=Mode.PREFILL, sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def reserve(tokens: list[int], *, max_tokens: int = 8, name: str = "r", local_below: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return make_request(name, tokens, mode=Mode.RESERVE, sampling=sampling, local_below=local_below)


# ---- PREFILL ----------------------------------------------------------------------------------------------------
def test_prefill_computes_one_token_and_keeps_pages_but_no_row_until_the_handover() -> None:
    world = World(make_config(rows=1))
    request = prefill(ids(5, 10))
    world.submit(request)
    world.settle()
    assert request.phase is Phase.SENDING
    assert [token.position for token in world.outputs[R]] == [0]
    assert R in world.done_prefills
    assert world.scheduler.load().pages.leased == 3
    world.submit(make_request("next", ids(6, 6), max_tokens=1))
    world.settle()
    assert RequestId("next") in world.ended, "the only row was given back"
    world.hand_off(R)
    assert request.phase is Phase.HANDED_OFF or request.phase is Phase.FENCING
    assert R not in world.ended, "the last gather may still read"
    assert world.scheduler.load().pages.in_flight == 1, "two pages are cached, the partial one waits for the fence"
    world.bring_home()
    world.check_end()
    assert world.ended[R] is None


def test_the_role_knows_the_pages_and_the_cached_part_before_the_first_step() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 12), max_tokens=1))
    world.settle()
    world.submit(prefill([*ids(5, 12), 9, 9, 9]))
    plan = world.plan()
    assert plan is not None
    assert world.handoffs[R].pages == plan.work[0].new_pages
    assert plan.work[0].start == 12
    world.bring_home()
    world.check_end()


def test_a_first_token_that_ends_the_request_is_not_handed_over() -> None:
    world = World(make_config())
    request = prefill(ids(5, 10), max_tokens=1)
    world.submit(request)
    world.settle()
    assert world.outputs[R][0].finish is FinishReason.LENGTH
    assert R not in world.done_prefills
    assert R not in world.ended, "the transfer's gathers are fenced all the same"
    world.bring_home()
    world.check_end()
    assert Phase.SENDING not in request.stamps


def test_a_failed_handover_is_the_requests_error() -> None:
    world = World(make_config())
    world.submit(prefill(ids(5, 10)))
    world.settle()
    world.hand_off(R, ok=False)
    world.bring_home()
    world.check_end()
    error = world.ended[R]
    assert error is not None
    assert error.kind is ErrorKind.TRANSFER


def test_a_handover_may_fail_while_the_prompt_is_computed() -> None:
    world = World(make_config(step_tokens=8))
    world.submit(prefill(ids(5, 40)))
    world.iterate()
    world.hand_off(R, ok=False)
    world.bring_home()
    world.check_end()
    assert world.outputs[R] == []


# ---- RESERVE ----------------------------------------------------------------------------------------------------
def test_reserve_leases_the_prompt_and_decodes_from_token_two() -> None:
    world = World(make_config())
    request = reserve(ids(5, 10))
    world.submit(request)
    assert request.phase is Phase.RESERVED
    assert (len(world.handoffs[R].pages), world.handoffs[R].first_missing) == (3, 0)
    world.receiving(R)
    world.receive(R)
    plan = world.plan()
    assert plan is not None
    (item,) = plan.work
    assert (item.start, item.count, item.output_position) == (10, 1, 1)
    assert item.input_ids == (request.tokens[10],)
    world.bring_home()
    world.check_end()
    edges = [Phase.QUEUED, Phase.RESERVED, Phase.RECEIVING, Phase.READY, Phase.RUNNING, Phase.FINISHED]
    assert list(request.stamps)[:6] == edges


def test_the_first_token_of_the_sender_is_not_told_twice() -> None:
    world = World(make_config())
    world.submit(reserve(ids(5, 10), max_tokens=3))
    world.receive(R)
    told = len(world.outputs[R])
    world.bring_home()
    assert told == 1
    assert [token.position for token in world.outputs[R]] == [0, 1, 2]


def test_only_missing_pages_are_wanted_and_at_least_the_last() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 16), max_tokens=1))
    world.settle()
    world.submit(reserve(ids(5, 16)))
    assert world.handoffs[R].first_missing == 12
    world.bring_home()
    world.check_end()


def test_received_pages_serve_the_next_turn() -> None:
    world = World(make_config())
    world.submit(reserve(ids(5, 10), max_tokens=4))
    world.bring_home()
    following = make_request("next", [*ids(5, 10), 9], max_tokens=1)
    world.submit(following)
    world.settle()
    world.check_end()
    assert following.cached_tokens == 8


def test_a_short_uncached_suffix_is_computed_here() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 16), max_tokens=1))
    world.settle()
    request = reserve([*ids(5, 16), 9, 9], local_below=4)
    world.submit(request)
    assert R in world.local
    assert request.mode is Mode.LOCAL
    world.settle()
    world.check_end()
    assert request.cached_tokens == 16


def test_reservations_are_capped() -> None:
    world = World(make_config(max_reserved=1))
    world.submit(reserve(ids(5, 10), name="one"))
    world.submit(reserve(ids(6, 10), name="two"))
    error = world.ended[RequestId("two")]
    assert error is not None
    assert error.kind is ErrorKind.OVERLOADED
    assert error.retry_after_ms > 0
    world.bring_home()
    world.check_end()


def test_a_reservation_without_room_is_refused_at_once() -> None:
    world = World(make_config(total_pages=6))
    world.submit(reserve(ids(5, 16), name="one"))
    world.submit(reserve(ids(6, 16), name="two"))
    error = world.ended[RequestId("two")]
    assert error is not None
    assert "too few" in str(error)
    world.bring_home()
    world.check_end()


def test_no_reservation_overtakes_a_request_that_waited_too_long_for_pages() -> None:
    world = World(make_config(total_pages=12, patience_s=1.0))
    world.submit(make_request("a", ids(6, 14), sampling=SamplingParams(max_tokens=30, ignore_eos=True)))
    world.iterate(seconds=2.0)
    world.submit(make_request("big", ids(7, 36), max_tokens=2))
    world.iterate(seconds=2.0)
    world.iterate()
    world.submit(reserve(ids(5, 4)))
    error = world.ended[R]
    assert error is not None
    assert error.kind is ErrorKind.OVERLOADED
    world.bring_home()
    world.check_end()


def test_the_first_token_made_here_says_how_much_was_cached_here() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 16), max_tokens=1))
    world.settle()
    world.submit(reserve(ids(5, 16), max_tokens=3))
    world.receive(R)
    world.bring_home()
    assert [token.cached_tokens for token in world.outputs[R]] == [None, 12, None]


def test_a_ready_request_waits_for_pages_while_others_compute_and_takes_none_of_theirs() -> None:
    world = World(make_config(total_pages=6, rows=3, step_tokens=32))
    world.submit(reserve(ids(5, 8)))
    world.submit(make_request("b", ids(6, 6), sampling=SamplingParams(max_tokens=11, ignore_eos=True)))
    for _ in range(8):
        world.iterate()
    assert world.scheduler.load().free_pages == 0
    world.receive(R)
    plan = world.iterate()
    assert plan is not None
    assert [item.request_id for item in plan.work] == ["b"]
    assert not world.preempted
    world.bring_home()
    world.check_end()


def test_an_abort_between_a_release_and_its_answer_waits_for_the_fence() -> None:
    world = World(make_config(total_pages=8), slow_release=True)
    for name in "ab":
        sampling = SamplingParams(max_tokens=24, ignore_eos=True)
        world.submit(make_request(name, ids(ord(name), 5), sampling=sampling))
    world.submit(reserve(ids(5, 5), max_tokens=24))
    world.receive(R)
    while R not in world.preempted:
        world.iterate()
    assert world.preempted == ["r"], "two wanted a page, its pages are enough for both"
    world.abort(R)
    assert world.requests[R].phase is Phase.ABORTING
    world.check()
    world.bring_home()
    world.check_end()


def test_a_ready_request_waits_for_a_row_and_keeps_its_pages() -> None:
    world = World(make_config(rows=1))
    world.submit(make_request("a", ids(6, 6), sampling=SamplingParams(max_tokens=6, ignore_eos=True)))
    world.iterate()
    request = reserve(ids(5, 10))
    world.submit(request)
    world.receive(R)
    world.iterate()
    assert request.phase is Phase.READY
    world.bring_home()
    world.check_end()


def test_a_received_token_that_ends_the_request_here_is_told_with_its_reason() -> None:
    tokens = next(ids(first, 9) for first in range(5000) if _stops_at_once(ids(first, 9)))
    world = World(make_config())
    request = make_request("r", tokens, mode=Mode.RESERVE, max_tokens=8)
    world.submit(request)
    world.receive(R)
    world.bring_home()
    world.check_end()
    (token,) = world.outputs[R]
    assert (token.position, token.token_id, token.finish) == (0, EOS, FinishReason.STOP)


def _stops_at_once(tokens: list[int]) -> bool:
    return reference(make_request("r", tokens, max_tokens=8), 96) == [EOS]


def test_late_scatters_hit_nobody_after_a_failed_transfer() -> None:
    world = World(make_config(total_pages=4, rows=2))
    world.submit(reserve(ids(5, 13)))
    world.receiving(R)
    world.fail_kv(R)
    world.submit(make_request("next", ids(6, 13), max_tokens=2))
    world.settle()
    assert world.requests[RequestId("next")].phase is Phase.QUEUED, "the pages are fenced"
    world.bring_home()
    world.check_end()
    error = world.ended[R]
    assert error is not None
    assert error.kind is ErrorKind.TRANSFER
    assert world.ended[RequestId("next")] is None


def test_a_failure_told_after_the_kv_arrived_harms_nobody() -> None:
    world = World(make_config())
    world.submit(reserve(ids(5, 10)))
    world.receive(R)
    world.fail_kv(R)
    world.iterate()
    world.fail_kv(R)
    world.bring_home()
    world.check_end()
    assert world.ended[R] is None


def test_a_preempted_receiver_is_released_once_and_goes_on_locally() -> None:
    world = World(make_config(total_pages=12))
    for name in "ab":
        sampling = SamplingParams(max_tokens=24, ignore_eos=True)
        world.submit(make_request(name, ids(ord(name), 7), sampling=sampling))
    request = reserve(ids(5, 7), max_tokens=24)
    world.submit(request)
    world.receive(R)
    world.bring_home()
    world.check_end()
    assert "r" in world.preempted
    assert request.mode is Mode.LOCAL
    assert world.ended[R] is None


def test_an_event_that_the_phase_does_not_allow_is_a_defect_and_raises() -> None:
    world = World(make_config())
    world.submit(make_request("r", ids(5, 10)))
    with pytest.raises(IllegalTransition, match="r: queued -> receiving"):
        world.receiving(R)
    with pytest.raises(IllegalTransition, match="r: queued -> handed_off"):
        world.hand_off(R)


@pytest.mark.parametrize("prompt", range(1, 22))
def test_both_sides_together_give_what_one_worker_alone_gives(prompt: int) -> None:
    alone = make_request("r", ids(5, prompt), max_tokens=9)
    expected = reference(alone, 96)
    sender, receiver = World(make_config(step_tokens=6)), World(make_config())
    receiver.submit(make_request("r", ids(5, prompt), mode=Mode.RESERVE, max_tokens=9))
    sender.submit(make_request("r", ids(5, prompt), mode=Mode.PREFILL, max_tokens=9))
    sender.settle()
    first = sender.outputs[R][0]
    if first.finish is None:
        assert next_token(_chain_value(ids(5, prompt))) == first.token_id
        receiver.receive(R)
        sender.hand_off(R)
    else:
        receiver.abort(R)
    for world in (sender, receiver):
        world.bring_home()
        world.check_end()
    seen = {token.position: token.token_id for world in (sender, receiver) for token in world.outputs[R]}
    assert [seen[position] for position in range(len(seen))] == expected


def _chain_value(tokens: list[int]) -> int:
    value = 0
    for token in tokens:
        value = hash((value, token))
    return value
