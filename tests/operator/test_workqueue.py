"""The line of keys: one of each, one worker each, failures later and later, nothing lost. On a clock the test owns."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from baton_common.clock import ManualClock
from baton_operator.workqueue import BackOff, WorkQueue


def queue(clock: ManualClock, **back_off: float) -> WorkQueue[str]:
    return WorkQueue(clock, back_off=BackOff(**back_off), dice=random.Random(0))


def test_a_key_added_many_times_waits_once() -> None:
    line = queue(ManualClock())
    for _ in range(5):
        line.add("a")
    line.add("b")
    assert [line.pop(), line.pop(), line.pop()] == ["a", "b", None]


def test_a_key_added_while_in_work_comes_again_and_never_to_two_workers() -> None:
    line = queue(ManualClock())
    line.add("a")
    assert line.pop() == "a"
    line.add("a")
    assert line.pop() is None
    line.succeed("a")
    assert line.pop() == "a"


def test_an_earlier_appointment_stands_and_a_later_one_is_moved_up() -> None:
    clock = ManualClock()
    line = queue(clock)
    line.add("a", after_s=10)
    line.add("a", after_s=50)
    line.add("b", after_s=10)
    line.add("b", after_s=1)
    clock.advance(1)
    assert [line.pop(), line.pop()] == ["b", None]
    clock.advance(9)
    assert line.pop() == "a"
    line.succeed("a")
    assert line.next_due_s() is None or line.pop() is None


def test_failures_wait_longer_and_longer_up_to_a_cap_and_success_forgets_them() -> None:
    clock = ManualClock()
    line = queue(clock, first_s=1, cap_s=10)
    delays = []
    line.add("a")
    for _ in range(8):
        assert line.pop() == "a"
        delays.append(line.fail("a"))
        clock.advance(delays[-1])
    assert all(0.75 <= delay / ideal <= 1 for delay, ideal in zip(delays, [1, 2, 4, 8, 10, 10, 10, 10], strict=True))
    line.pop()
    line.succeed("a")
    line.add("a")
    line.pop()
    assert line.fail("a") <= 1


def test_a_change_is_not_held_up_by_back_off() -> None:
    line = queue(ManualClock(), first_s=30)
    line.add("a")
    line.pop()
    line.fail("a")
    assert line.pop() is None
    line.add("a")
    assert line.pop() == "a"


def test_what_the_server_asked_for_is_the_least_wait() -> None:
    line = queue(ManualClock(), first_s=1)
    line.add("a")
    line.pop()
    assert line.fail("a", least_s=17) == 17


@given(st.lists(st.tuples(st.sampled_from(["add", "later", "pop", "done", "fail", "time"]), st.sampled_from("abc"))))
def test_no_key_is_lost_and_none_is_worked_on_twice_at_a_time(steps: list[tuple[str, str]]) -> None:
    clock = ManualClock()
    line = queue(clock)
    working: set[str] = set()
    owed: set[str] = set()
    for step, key in steps:
        if step in ("add", "later"):
            line.add(key, after_s=3.0 if step == "later" else 0.0)
            owed.add(key)
        elif step == "pop" and (got := line.pop()) is not None:
            assert got not in working
            working.add(got)
            owed.discard(got)
        elif step in ("done", "fail") and key in working:
            working.discard(key)
            if step == "done":
                line.succeed(key)
            else:
                line.fail(key)
                owed.add(key)
        elif step == "time":
            clock.advance(1)
    for key in working:
        line.succeed(key)
    clock.advance(1000)
    assert {line.pop() for _ in range(len(line))} == owed
