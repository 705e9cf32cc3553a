"""Request state machine: the table is the specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_world import make_request

from baton_engine.request import TRANSITIONS, IllegalTransition, Phase


def reachable(start: Phase) -> set[Phase]:
    seen, todo = {start}, [start]
    while todo:
        fresh = TRANSITIONS[todo.pop()] - seen
        seen |= fresh
        todo.extend(fresh)
    return seen


def test_every_phase_is_in_the_table_and_can_happen() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert reachable(Phase.QUEUED) == set(Phase)


@pytest.mark.parametrize("phase", Phase)
def test_from_every_phase_the_end_is_reachable(phase: Phase) -> None:
    assert Phase.FREED in reachable(phase)


def test_nothing_follows_freed_and_only_fencing_leads_there() -> None:
    assert not TRANSITIONS[Phase.FREED]
    assert [phase for phase in Phase if Phase.FREED in TRANSITIONS[phase]] == [Phase.FENCING]


OVER = (Phase.FINISHED, Phase.HANDED_OFF, Phase.ABORTING, Phase.FENCING, Phase.FREED)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in OVER])
def test_every_live_phase_can_be_aborted(phase: Phase) -> None:
    assert Phase.ABORTING in TRANSITIONS[phase]


@given(steps=st.lists(st.sampled_from(Phase), max_size=12))
def test_only_edges_of_the_table_are_taken_and_each_is_stamped(steps: list[Phase]) -> None:
    request = make_request("r", [1, 2])
    for now_s, to in enumerate(steps, start=1):
        before = request.phase
        if to in TRANSITIONS[before]:
            request.advance(to, float(now_s))
            assert request.phase is to
            assert request.stamps[to] == now_s
        else:
            with pytest.raises(IllegalTransition, match=f"r: {before.value} -> {to.value}"):
                request.advance(to, float(now_s))
            assert request.phase is before


def test_outputs_made_elsewhere_count() -> None:
    assert make_request("r", [1, 2, 3], prompt_tokens=2).output_tokens == 1
