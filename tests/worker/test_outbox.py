"""Events of other threads reach the loop in order, with one wake-up per burst."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from baton_common.ids import RequestId
from baton_worker.outbox import Ended, Event, Outbox


def event(index: int) -> Ended:
    return Ended(request_id=RequestId(str(index)), error=None)


async def test_a_burst_is_one_delivery_in_order() -> None:
    outbox, seen = Outbox(asyncio.get_running_loop()), []
    outbox.open(seen.append)
    thread = threading.Thread(target=lambda: [outbox.put(event(index)) for index in range(100)])
    thread.start()
    thread.join()  # the loop could not run meanwhile
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [[item.request_id for item in burst] for burst in seen] == [[str(index) for index in range(100)]]


async def test_nothing_is_lost_between_bursts_of_many_threads() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    seen: list[Event] = []

    def deliver(events: Sequence[Event]) -> None:
        seen.extend(events)

    outbox.open(deliver)
    threads = [
        threading.Thread(target=lambda base=base: [outbox.put(event(base + index)) for index in range(200)])
        for base in (0, 1000, 2000)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or len(seen) < 600:
        await asyncio.sleep(0.001)
    ids = [int(item.request_id) for item in seen if isinstance(item, Ended)]
    for base in (0, 1000, 2000):
        assert [number for number in ids if base <= number < base + 1000] == [base + index for index in range(200)]


async def test_events_before_open_wait_and_events_after_close_are_dropped() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    seen: list[Event] = []
    outbox.put(event(1))
    await asyncio.sleep(0)
    outbox.open(seen.extend)
    outbox.put(event(2))
    outbox.close()
    outbox.put(event(3))
    await asyncio.sleep(0)
    assert seen == [event(1), event(2)]


async def test_what_may_wait_comes_with_the_next_event_and_wakes_nobody() -> None:
    outbox, seen = Outbox(asyncio.get_running_loop()), []
    outbox.open(seen.append)
    outbox.put(event(1), wake=False)
    for _ in range(3):
        await asyncio.sleep(0)
    assert seen == []
    outbox.put(event(2))
    outbox.put(event(3), wake=False)
    for _ in range(3):
        await asyncio.sleep(0)
    assert seen == [[event(1), event(2), event(3)]]
    outbox.put(event(4), wake=False)
    outbox.close()
    assert seen[1:] == [[event(4)]]
