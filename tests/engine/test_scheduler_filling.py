"""Scheduler: KV of a prompt comes from elsewhere before the rest is computed; pages that are told hold still."""

from __future__ import annotations

import pytest
from support.schedule_world import World, make_config, make_request

from baton_common.errors import Aborted, ErrorKind
from baton_common.ids import RequestId
from baton_engine.request import IllegalTransition, Mode, Phase, Request, SamplingParams
from baton_engine.sched.scheduler import FENCE_POLL_S
from baton_engine.step import StepPlan

R = RequestId("r")
PAGE = 4


def ids(first: int, count: int) -> list[int]:
    return [first, *(2 + index % 40 for index in range(count - 1))]


def filling(tokens: int, *, name: str = "r", mode: Mode = Mode.LOCAL, first: int = 5, local_below: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    return make_request(name, ids(first, tokens), mode=mode, sampling=sampling, fills=True, local_below=local_below)


def planned(world: World) -> StepPlan:
    plan = world.plan()
    assert plan is not None
    return plan


# ---- LOCAL and PREFILL ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pages", "computed_from"), [(0, 0), (2, 8), (99, 16)])
def test_what_was_filled_is_cached_and_the_rest_is_computed(pages: int, computed_from: int) -> None:
    world = World(make_config())
    request = filling(19)
    world.submit(request)
    assert world.plan() is None, "nothing else to do meanwhile"
    assert (request.phase, world.filling()) == (Phase.FILLING, [R])
    world.fill(R, pages)
    (work,) = planned(world).work
    assert (work.start, work.count) == (computed_from, min(16, 19 - computed_from))
    world.bring_home()
    world.check_end()
    assert request.cached_tokens == computed_from
    assert world.outputs[R][0].cached_tokens == computed_from
    assert list(request.stamps)[:3] == [Phase.QUEUED, Phase.FILLING, Phase.PREFILLING]


def test_the_last_token_is_always_computed() -> None:
    world = World(make_config())
    world.submit(filling(3 * PAGE))
    world.plan()
    world.fill(R, 99)
    (work,) = planned(world).work
    assert (work.start, work.count) == (2 * PAGE, PAGE)
    world.bring_home()
    world.check_end()


def test_filled_pages_are_shared_like_computed_ones() -> None:
    world = World(make_config())
    world.submit(filling(19))
    world.plan()
    world.fill(R, 3)
    other = make_request("other", [*ids(5, 12), 9, 9], max_tokens=1)
    world.submit(other)
    world.bring_home()
    world.check_end()
    assert other.cached_tokens == 12


def test_a_prompt_that_is_in_the_tree_or_shorter_than_a_page_is_not_filled() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 19), max_tokens=1))
    world.settle()
    for name, tokens in (("r", 19), ("short", 3)):
        world.submit(filling(tokens, name=name))
        assert world.plan() is not None
        assert world.filling() == []
        world.bring_home()
    world.check_end()
    assert Phase.FILLING not in world.requests[R].stamps


def test_only_what_the_tree_lacks_is_asked_for() -> None:
    world = World(make_config())
    world.submit(make_request("before", ids(5, 8), max_tokens=2))
    world.settle()
    world.submit(filling(19))
    world.plan()
    assert world.handoffs[R].first_missing == 8
    world.fill(R, 1)
    assert planned(world).work[0].start == 12
    world.bring_home()
    world.check_end()


def test_others_compute_while_one_is_filled_and_it_goes_before_the_waiting() -> None:
    world = World(make_config(rows=1))
    world.submit(filling(19))
    world.submit(make_request("other", ids(6, 6), max_tokens=2))
    world.submit(make_request("later", ids(7, 6), max_tokens=2))
    assert planned(world).work[0].request_id == "other"
    world.fill(R, 99)
    while "other" not in world.ended:
        world.iterate()
    world.settle()
    assert list(world.ended) == ["other", "r", "later"]
    world.check_end()


def test_two_that_are_filled_with_the_same_pages_keep_them_once() -> None:
    world = World(make_config())
    for name in "ab":
        world.submit(filling(19, name=name))
    world.plan()
    for name in world.filling():
        world.fill(name, 99)
    world.bring_home()
    world.check_end()
    assert [world.requests[RequestId(name)].cached_tokens for name in "ab"] == [16, 16]
    pages = world.scheduler.load().pages
    assert pages.cached == 6, "19 tokens and 5 outputs whose KV was written: both are the same"


@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize("mode", list(Mode))
def test_what_others_computed_meanwhile_is_not_computed_again(mode: Mode, pages: int) -> None:
    world = World(make_config(), reads=True)
    request = filling(19, mode=mode)
    world.submit(request)
    world.plan()
    before = world.scheduler.load().pages.free
    world.submit(make_request("other", ids(5, 13), max_tokens=1))
    world.settle()
    world.fill(R, pages)
    free = world.scheduler.load().pages.free
    assert free == before - pages, "it has three of the other's pages; of its own all that came, and what lies behind"
    if mode is Mode.RESERVE:
        assert world.handoffs[R].first_missing == 12
    else:
        (work,) = planned(world).work
        assert (work.start, work.count) == (12, 7)
    world.bring_home()
    world.check_end()
    assert (request.cached_tokens, request.filled_tokens) == (12, pages * PAGE)
    assert world.readers.told.count(request.hashes[2]) == 2, "the second time as a hit"


def test_pages_of_a_prefill_are_announced_after_they_were_filled() -> None:
    world = World(make_config())
    world.submit(filling(19, mode=Mode.PREFILL))
    world.plan()
    assert world.handoffs[R].filling
    world.fill(R, 2)
    assert R not in world.handoffs
    planned(world)
    assert not world.handoffs[R].filling, "on_prefill_admitted, which names the computed part"
    world.bring_home()
    world.check_end()


def test_beyond_the_bound_everything_is_computed() -> None:
    world = World(make_config(max_filling=1))
    for name in "ab":
        world.submit(filling(19, name=name, first=ord(name)))
    assert [work.request_id for work in planned(world).work] == ["b"]
    assert world.filling() == ["a"]
    world.bring_home()
    world.check_end()


def test_a_preempted_request_is_filled_again() -> None:
    world = World(make_config(total_pages=8))
    for name in "ab":
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        world.submit(make_request(name, ids(ord(name), 7), sampling=sampling, fills=True))
    filled: list[RequestId] = []
    while len(world.ended) < 2:
        world.iterate()
        for name in world.filling():
            filled.append(name)
            world.fill(name, 99)
    world.bring_home()
    world.check_end()
    assert world.preempted
    assert len(filled) > 2
    assert all(request.cached_tokens == 4 for request in world.requests.values()), "of the first admission"


# ---- RESERVE ----------------------------------------------------------------------------------------------------
def test_a_reservation_wants_from_the_sender_what_was_not_filled() -> None:
    world = World(make_config())
    request = filling(19, mode=Mode.RESERVE)
    world.submit(request)
    assert (request.phase, world.scheduler.load().reserved) == (Phase.FILLING, 1)
    world.fill(R, 2)
    assert (request.phase, world.scheduler.load().reserved) == (Phase.RESERVED, 1)
    assert world.handoffs[R].first_missing == 8
    assert request.cached_tokens == 8
    world.receive(R)
    world.bring_home()
    world.check_end()
    assert world.ended[R] is None


def test_a_reservation_with_little_left_after_it_was_filled_computes_that_itself() -> None:
    world = World(make_config())
    request = filling(19, mode=Mode.RESERVE, local_below=8)
    world.submit(request)
    world.fill(R, 99)
    assert (request.mode, R in world.local) == (Mode.LOCAL, True)
    (work,) = planned(world).work
    assert (work.start, work.count) == (16, 3)
    world.bring_home()
    world.check_end()


def test_filling_reservations_count_as_reserved() -> None:
    world = World(make_config(max_reserved=1))
    world.submit(filling(19, mode=Mode.RESERVE))
    world.submit(filling(19, name="more", mode=Mode.RESERVE, first=6))
    error = world.ended[RequestId("more")]
    assert error is not None
    assert error.kind is ErrorKind.OVERLOADED
    world.bring_home()
    world.check_end()


# ---- ends -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slow_release", [False, True])
@pytest.mark.parametrize("mode", list(Mode))
def test_pages_of_an_aborted_fill_wait_for_its_last_write(mode: Mode, slow_release: bool) -> None:
    world = World(make_config(total_pages=6), slow_release=slow_release)
    world.submit(filling(19, mode=mode))
    world.plan()
    world.abort(R)
    assert R not in world.ended
    world.scheduler.kv_filled(R, 16, world.clock.now())  # crossed the abort
    world.submit(make_request("next", ids(6, 13), max_tokens=2))
    world.settle()
    assert RequestId("next") not in world.ended, "too few pages, the others are still written"
    world.bring_home()
    world.check_end()
    assert isinstance(world.ended[R], Aborted)
    assert world.ended[RequestId("next")] is None


def test_an_answer_that_does_not_come_costs_the_request_its_deadline() -> None:
    world = World(make_config())
    request = filling(19)
    request.deadline_s = 5.0
    world.submit(request)
    world.plan()
    assert world.scheduler.sleep_s(world.clock.now()) == 4.0
    world.clock.advance(4.0)
    world.plan()
    assert request.phase is Phase.FENCING
    world.bring_home()
    world.check_end()
    error = world.ended[R]
    assert error is not None
    assert "in phase filling" in str(error)


def test_an_abort_after_the_answer_asks_nobody() -> None:
    world = World(make_config(rows=1))
    world.submit(filling(19))
    world.submit(make_request("other", ids(6, 6)))
    world.iterate()
    world.fill(R, 99)
    world.abort(R)
    assert R in world.ended, "nobody else touches its pages"
    world.bring_home()
    world.check_end()


def test_a_wrong_answer_is_a_defect_and_raises() -> None:
    world = World(make_config())
    world.submit(filling(19))
    with pytest.raises(IllegalTransition, match="r: filled in phase queued"):
        world.scheduler.kv_filled(R, 4, 0.0)
    world.plan()
    for tokens in (3, 20, -4):
        with pytest.raises(ValueError, match="not between 0 and 16"):
            world.scheduler.kv_filled(R, tokens, 0.0)
    world.fill(R, 1)
    with pytest.raises(IllegalTransition, match="r: filled in phase filling"):
        world.scheduler.kv_filled(R, 4, 0.0)


# ---- pages that are told ------------------------------------------------------------------------------------------
def test_pages_are_told_when_they_are_complete_and_when_others_find_them() -> None:
    world = World(make_config(), reads=True)
    world.submit(make_request("a", ids(5, 13), max_tokens=2))
    world.settle()
    hashes = world.requests[RequestId("a")].hashes
    assert world.readers.told == hashes[:3]
    world.submit(make_request("b", [*ids(5, 8), 9, 9], max_tokens=1))
    world.bring_home()
    assert world.readers.told[3:] == hashes[:2]
    world.submit(filling(19, first=6))
    world.plan()
    world.fill(R, 2)
    assert world.readers.told[5:] == world.requests[R].hashes[:2]
    world.bring_home()
    world.check_end()


def test_nobody_listens_nothing_is_told() -> None:
    world = World(make_config())
    world.submit(make_request("a", ids(5, 13), max_tokens=2))
    world.bring_home()
    assert world.readers.told == []


def test_a_page_that_is_read_is_not_given_away() -> None:
    world = World(make_config(total_pages=4, context_tokens=16), reads=True)
    world.submit(make_request("a", ids(5, 13), max_tokens=1))
    world.settle()
    assert world.scheduler.load().free_pages == 1
    world.submit(make_request("b", ids(6, 13), max_tokens=1))
    world.settle()
    assert RequestId("b") not in world.ended, "three of four pages are being copied"
    world.bring_home()
    world.check_end()
    assert world.ended[RequestId("b")] is None


def test_a_decode_waits_for_a_reader_before_it_takes_pages_from_others() -> None:
    world = World(make_config(total_pages=6, context_tokens=24), reads=True)
    world.submit(make_request("done", ids(4, 9), max_tokens=1))
    world.settle()
    for name in "ab":
        world.submit(make_request(name, ids(ord(name), 4), sampling=SamplingParams(max_tokens=7, ignore_eos=True)))
    world.settle()
    assert world.preempted == []
    world.bring_home()
    world.check_end()
    assert world.preempted == []


# ---- the network --------------------------------------------------------------------------------------------------
def test_prefill_does_not_run_far_ahead_of_the_network() -> None:
    config = make_config(step_tokens=8)
    world = World(config)
    first = make_request("first", ids(5, 40), mode=Mode.PREFILL)
    world.submit(first)
    world.iterate()
    world.unsent_tokens = 1 + config.unsent_steps * config.step_tokens
    world.submit(make_request("second", ids(6, 40), mode=Mode.PREFILL))
    world.submit(make_request("local", ids(7, 9), max_tokens=1))
    world.settle()
    assert first.phase is Phase.SENDING, "what is in progress goes on"
    assert world.ended == {"local": None}
    assert world.requests[RequestId("second")].phase is Phase.QUEUED
    assert world.scheduler.load().unsent_tokens == world.unsent_tokens
    world.plan()
    assert world.scheduler.sleep_s(world.clock.now()) == FENCE_POLL_S, "the network calls nobody when it is free again"
    world.bring_home()
    world.check_end()


def test_a_filled_prefill_waits_for_the_network_too() -> None:
    world = World(make_config())
    world.submit(filling(19, mode=Mode.PREFILL))
    world.plan()
    world.unsent_tokens = 1 << 20
    world.fill(R, 2)
    world.settle()
    assert world.requests[R].phase is Phase.FILLING
    world.bring_home()
    world.check_end()
