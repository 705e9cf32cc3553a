"""Scheduling decisions as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_world import EOS, make_config, make_request

from baton_common.errors import ConfigError, ErrorKind
from baton_engine.request import FinishReason, SamplingParams
from baton_engine.sched.policy import finish_reason, refusal, retry_after_ms, share_out

PAGE = 4


@given(
    wants=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=8),
    budget=st.integers(0, 80),
)
def test_shares_stay_inside_budget_and_prompt(wants: list[tuple[int, int]], budget: int) -> None:
    counts = share_out(wants, budget, PAGE)
    assert sum(counts) <= budget
    assert all(0 <= count <= remaining for count, (_, remaining) in zip(counts, wants, strict=True))


@given(wants=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=8))
def test_everybody_advances_when_the_budget_has_a_page_for_each(wants: list[tuple[int, int]]) -> None:
    assert all(share_out(wants, PAGE * len(wants), PAGE))


@given(
    wants=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=8),
    budget=st.integers(0, 80),
)
def test_unfinished_chunks_end_on_a_page_border_unless_they_reach_none(
    wants: list[tuple[int, int]], budget: int
) -> None:
    for count, (start, remaining) in zip(share_out(wants, budget, PAGE), wants, strict=True):
        if 0 < count < remaining:
            assert (start + count) % PAGE == 0 or start // PAGE == (start + count) // PAGE


def test_a_lone_prefill_gets_the_whole_budget() -> None:
    assert share_out([(0, 100)], 16, PAGE) == [16]


def test_the_first_finishes_its_prompt_and_the_rest_goes_on_in_order() -> None:
    assert share_out([(0, 3), (0, 100), (0, 100)], 24, PAGE) == [3, 12, 8]


def test_a_share_is_at_least_a_page() -> None:
    assert share_out([(0, 100)] * 4, 8, PAGE) == [4, 4, 0, 0]


def sampled(token: int, outputs: int = 1, **sampling: object) -> FinishReason | None:
    params = SamplingParams(**({"max_tokens": 9} | sampling))  # type: ignore[arg-type]
    request = make_request("r", [5] * (4 + outputs - 1) + [token], prompt_tokens=4, sampling=params)
    return finish_reason(request, frozenset({EOS}), context_tokens=20)


def test_a_sequence_ends_at_eos_stop_id_length_or_context() -> None:
    assert sampled(7) is None
    assert sampled(EOS) is FinishReason.STOP
    assert sampled(7, stop_token_ids=frozenset({7})) is FinishReason.STOP
    assert sampled(7, outputs=9) is FinishReason.LENGTH
    assert sampled(7, outputs=16, max_tokens=99) is FinishReason.LENGTH
    assert sampled(EOS, outputs=9) is FinishReason.STOP


def test_ignored_eos_is_a_token_like_others_but_stop_ids_still_stop() -> None:
    assert sampled(EOS, ignore_eos=True) is None
    assert sampled(EOS, ignore_eos=True, stop_token_ids=frozenset({EOS})) is FinishReason.STOP


def test_min_tokens_outputs_come_before_any_stop() -> None:
    assert sampled(EOS, outputs=2, min_tokens=2) is None
    assert sampled(EOS, outputs=3, min_tokens=2) is FinishReason.STOP


@pytest.mark.parametrize(
    ("tokens", "changes", "message", "param"),
    [
        (96, {}, "96 tokens leave no room in a context of 96", "prompt"),
        (32, {"total_pages": 8}, "32 tokens do not fit the KV pool of 32 tokens", "prompt"),
        (0, {}, "prompt of 0 tokens", "prompt"),
    ],
)
def test_what_can_never_work_is_refused_with_both_numbers(
    tokens: int, changes: dict[str, int], message: str, param: str
) -> None:
    error = refusal(make_request("r", [3] * tokens), make_config(**changes))
    assert error is not None
    assert message in str(error)
    assert (error.kind, error.param, error.request_id) == (ErrorKind.INVALID, param, "r")


def test_outputs_beyond_max_tokens_are_refused() -> None:
    error = refusal(make_request("r", [3] * 8, prompt_tokens=4, max_tokens=4), make_config())
    assert error is not None
    assert error.param == "max_tokens"


def test_a_request_that_just_fits_is_not_refused() -> None:
    assert refusal(make_request("r", [3] * 31), make_config(total_pages=8)) is None


def test_retry_after_follows_the_waiting_work_within_bounds() -> None:
    assert retry_after_ms(500, 1000.0) == 500
    assert retry_after_ms(0, 1000.0) == 50
    assert retry_after_ms(10**9, 1000.0) == 10_000
    assert retry_after_ms(500, 0.0) == 1000


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"step_tokens": 3}, "step_tokens"), ({"rows": 0}, "rows"), ({"max_queued": -1}, "max_queued")],
)
def test_numbers_that_cannot_work_together_are_refused_by_name(changes: dict[str, int], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    assert caught.value.param == param
