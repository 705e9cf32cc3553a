"""Calls at their times."""

from __future__ import annotations

import threading

from support.kv_world import LIMIT_S, eventually

from baton_common.clock import ManualClock, SystemClock
from baton_kvtransfer.tiers.alarm import Alarm


def test_calls_come_in_the_order_of_their_times() -> None:
    clock, said = ManualClock(), []
    alarm = Alarm(clock)
    for due_s in (3.0, 1.0, 1e12, 2.0):
        alarm.at(due_s, lambda due_s=due_s: said.append(due_s))
    clock.advance(10.0)
    alarm.at(4.0, lambda: said.append(4.0))
    eventually(lambda: len(said) == 4, "their time came")
    assert said == [1.0, 2.0, 3.0, 4.0]
    alarm.close(LIMIT_S)


def test_nobody_has_to_wake_it() -> None:
    clock, called = SystemClock(), threading.Event()
    alarm = Alarm(clock)
    alarm.at(clock.now() + 0.05, called.set)
    assert called.wait(LIMIT_S)
    alarm.close(LIMIT_S)


def test_no_call_comes_before_its_time() -> None:
    """The clock stands still, and a later call wakes the thread."""
    clock, said, woken = ManualClock(), [], threading.Event()
    alarm = Alarm(clock)
    alarm.at(1.0, lambda: said.append("early"))
    alarm.at(0.0, woken.set)
    assert woken.wait(LIMIT_S)
    assert said == []
    clock.advance(1.0)
    alarm.at(0.5, lambda: said.append("first"))
    eventually(lambda: said == ["first", "early"], "both are due")
    alarm.close(LIMIT_S)


def test_a_call_that_fails_stops_no_other() -> None:
    alarm, said = Alarm(ManualClock()), []
    alarm.at(-2.0, lambda: said.append(1 // 0))
    alarm.at(-1.0, lambda: said.append("next"))
    eventually(lambda: said == ["next"], "the next call")
    alarm.close(LIMIT_S)


def test_what_is_not_due_when_it_closes_is_dropped() -> None:
    clock, said = ManualClock(), []
    alarm = Alarm(clock)
    alarm.at(1.0, lambda: said.append("late"))
    alarm.close(LIMIT_S)
    clock.advance(2.0)
    alarm.at(1.0, lambda: said.append("later"))
    assert said == []
