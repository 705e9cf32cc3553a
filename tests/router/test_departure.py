"""How a router leaves: ready no more at once, clients sent elsewhere, open answers finished, never for ever."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from router.conftest import HELLO, MODEL, House, eventually

from baton_common.clock import ManualClock
from baton_proto import worker_pb2 as wire
from baton_router.departure import LINGER_S, QUIET_S, Departure
from baton_router.service import Router

DRAIN_S = 25.0
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 2}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def departure(clock: ManualClock) -> Departure:
    return Departure(DRAIN_S, clock)


def test_a_router_that_stays_takes_everything(departure: Departure, clock: ManualClock) -> None:
    clock.advance(10_000)
    assert (departure.under_way, departure.refuses, departure.over(0)) == (False, False, False)


def test_first_it_lingers_then_it_refuses(departure: Departure, clock: ManualClock) -> None:
    departure.begin(linger=True)
    assert (departure.under_way, departure.refuses) == (True, False)
    clock.advance(LINGER_S)
    assert departure.refuses
    departure.begin(linger=True)
    assert departure.refuses, "a second signal starts nothing anew"


def test_whom_nobody_asks_may_go_at_once(departure: Departure) -> None:
    departure.begin(linger=True)
    assert departure.over(0)
    assert not departure.over(1)


def test_it_waits_until_nobody_has_asked_for_a_while(departure: Departure, clock: ManualClock) -> None:
    departure.asked()
    departure.begin(linger=True)
    clock.advance(QUIET_S - 0.1)
    assert not departure.over(0)
    departure.asked()
    clock.advance(QUIET_S - 0.1)
    assert not departure.over(0)
    clock.advance(0.1)
    assert departure.over(0)


def test_neither_answers_nor_askers_hold_it_beyond_its_time(departure: Departure, clock: ManualClock) -> None:
    departure.begin(linger=True)
    clock.advance(DRAIN_S - 1)
    departure.asked()
    assert departure.left_s == 1
    assert not departure.over(3)
    clock.advance(1)
    departure.asked()
    assert departure.left_s == 0
    assert departure.over(3)


def test_without_lingering_only_open_answers_count(departure: Departure, clock: ManualClock) -> None:
    departure.asked()
    departure.begin(linger=False)
    assert departure.refuses
    assert departure.over(0)
    assert not departure.over(1)


def test_a_short_drain_keeps_time_for_its_answers(clock: ManualClock) -> None:
    departure = Departure(2.0, clock)
    departure.begin(linger=True)
    clock.advance(1.0)
    assert departure.refuses
    assert not departure.over(1)
    none = Departure(0.0, clock)
    none.begin(linger=True)
    assert none.over(5)


async def serving(house: House) -> tuple[Router, str]:
    await house.add(wire.ROLE_COLOCATED)
    url = await house.serve()
    assert house.router is not None
    return house.router, url


async def test_a_lingering_router_serves_but_is_not_ready_and_closes_its_connections(
    house: House, http: httpx.AsyncClient
) -> None:
    router, url = await serving(house)
    before = await http.post(f"{url}/v1/chat/completions", json=BODY)
    assert "connection" not in before.headers
    router.departure.begin(linger=True)
    for path, body in (("chat/completions", BODY), ("completions", {"model": MODEL, "prompt": "x", "max_tokens": 2})):
        answer = await http.post(f"{url}/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["connection"] == "close"
    ready = await http.get(f"{url}/ready")
    assert ready.status_code == 503
    assert ready.json()["reasons"] == ["the router is shutting down"]
    assert (await http.get(f"{url}/health")).status_code == 200, "it must not be killed for leaving"


async def test_later_it_asks_to_come_back_in_a_way_that_clients_understand(
    house: House, http: httpx.AsyncClient, clock: ManualClock
) -> None:
    router, url = await serving(house)
    router.departure.begin(linger=False)
    answer = await http.post(f"{url}/v1/chat/completions", json=BODY)
    assert answer.status_code == 503
    assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
    assert answer.json()["error"]["code"] == "draining"
    assert not house.workers[0].submits
    patient = house.client().with_options(max_retries=2)
    asked = asyncio.create_task(patient.completions.create(model=MODEL, prompt="x", max_tokens=2))
    await eventually(lambda: b'endpoint="completions"' in router.metrics.text(), "it was refused")
    router.departure = Departure(DRAIN_S, clock)  # as if its next connection led to another router
    assert (await asked).choices[0].finish_reason == "length"
    assert b'code="503",endpoint="completions"} 1.0' in router.metrics.text()


async def test_probes_and_scrapes_do_not_keep_a_router(house: House, http: httpx.AsyncClient) -> None:
    router, url = await serving(house)
    for path in ("/ready", "/health", "/metrics"):
        await http.get(f"{url}{path}")
    router.departure.begin(linger=True)
    assert router.departure.over(router.open_answers)
    await http.get(f"{url}/v1/models")
    assert not router.departure.over(router.open_answers), "a client was here a moment ago"
