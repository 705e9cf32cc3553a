"""`cache_control`: which worker is told to keep KV, under which name and for whom; and the end of a session."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import pytest
from router.conftest import HELLO, MODEL, House, eventually
from router.fake_worker import FakeWorker

from baton_common.clock import ManualClock
from baton_common.ids import PageHash
from baton_proto import worker_pb2 as wire
from baton_router.homes import Homes

EPHEMERAL = {"type": "ephemeral"}
PLAIN = "A completion goes on where its prompt ends, and its next turn begins with all of that. " * 3


async def post(http: httpx.AsyncClient, url: str, path: str, **body: Any) -> httpx.Response:
    answer = await http.post(f"{url}/v1/{path}", json={"model": MODEL, "max_tokens": 4, **body})
    assert answer.status_code == 200, answer.text
    return answer


async def chat(
    http: httpx.AsyncClient, url: str, messages: list[dict[str, str]] = HELLO, **body: Any
) -> httpx.Response:
    return await post(http, url, "chat/completions", messages=messages, **body)


def keeps(worker: FakeWorker) -> list[wire.KvKeep | None]:
    return [submit.keep if submit.HasField("keep") else None for submit in worker.submits]


async def test_the_decode_worker_is_told_to_keep_and_prefill_is_not(house: House, http: httpx.AsyncClient) -> None:
    prefill, decode = await house.pair()
    url = await house.serve()
    answer = await chat(http, url, cache_control={**EPHEMERAL, "ttl": "90s", "session": "a chat/no 1"})
    assert keeps(decode) == [wire.KvKeep(session="a chat/no 1", ttl_ms=90_000)]
    assert keeps(prefill) == [None]
    assert answer.headers["x-baton-session"] == quote("a chat/no 1", safe="")


async def test_a_worker_that_does_all_itself_is_told_too(house: House, http: httpx.AsyncClient) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    url = await house.serve()
    await chat(http, url, stream=True, cache_control={**EPHEMERAL, "ttl": "1h", "session": "s"})
    assert [submit.mode for submit in worker.submits] == [wire.SUBMIT_MODE_LOCAL]
    assert keeps(worker) == [wire.KvKeep(session="s", ttl_ms=3_600_000)]


async def test_without_the_field_nothing_is_kept(house: House, http: httpx.AsyncClient) -> None:
    _, decode = await house.pair()
    url = await house.serve()
    answer = await chat(http, url, prompt_cache_key="key", user="me", cache_control=None)
    assert keeps(decode) == [None]
    assert "x-baton-session" not in answer.headers


async def test_the_second_worker_keeps_what_the_first_one_lost(house: House, http: httpx.AsyncClient) -> None:
    _, first = await house.pair()
    second = await house.add(wire.ROLE_DECODE)
    first.script.die_after_tokens = second.script.die_after_tokens = 2
    url = await house.serve()
    await chat(http, url, max_tokens=9, cache_control={**EPHEMERAL, "session": "s"})
    told = keeps(first) + keeps(second)
    assert len(told) > 1
    assert told == [wire.KvKeep(session="s", ttl_ms=300_000)] * len(told)


async def test_of_several_choices_one_is_gone_on_from(house: House, http: httpx.AsyncClient) -> None:
    _, decode = await house.pair()
    url = await house.serve()
    await chat(http, url, n=3, cache_control={**EPHEMERAL, "session": "s"})
    assert sum(keep is not None for keep in keeps(decode)) == 1


async def test_several_prompts_are_no_conversation(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    body = {"model": MODEL, "prompt": ["a", "b"], "cache_control": EPHEMERAL}
    answer = await http.post(f"{url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_control")


# ---- names ----------------------------------------------------------------------------------------------------------
SYSTEM = {"role": "system", "content": "You are brief."}
FIRST = {"role": "user", "content": "Hello there"}
REST = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"}]


async def session_of(http: httpx.AsyncClient, url: str, messages: list[dict[str, str]], **body: Any) -> str:
    answer = await chat(http, url, messages, **{"cache_control": EPHEMERAL, **body})
    return answer.headers["x-baton-session"]


async def test_all_turns_of_a_conversation_have_one_name_and_others_another(
    house: House, http: httpx.AsyncClient
) -> None:
    _, decode = await house.pair()
    url = await house.serve()
    first = await session_of(http, url, [SYSTEM, FIRST])
    assert await session_of(http, url, [SYSTEM, FIRST, *REST]) == first
    others = [
        await session_of(http, url, [SYSTEM, {"role": "user", "content": "Good morning"}]),
        await session_of(http, url, [FIRST]),
        await session_of(http, url, [SYSTEM, FIRST], user="somebody"),
        await session_of(http, url, [SYSTEM, FIRST], cache_salt="salt"),
    ]
    assert len({first, *others}) == 5
    assert [keep.session for keep in keeps(decode) if keep] == [first, first, *others]
    assert {keep.ttl_ms for keep in keeps(decode) if keep} == {300_000}


async def test_the_name_is_the_clients_own_then_its_cache_key(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    assert await session_of(http, url, [FIRST], prompt_cache_key="key") == "key"
    named = {**EPHEMERAL, "session": "mine"}
    assert await session_of(http, url, [FIRST], prompt_cache_key="key", cache_control=named) == "mine"


async def test_plain_completions_are_named_by_how_they_begin(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    names = [
        (await post(http, url, "completions", prompt=prompt, cache_control=EPHEMERAL)).headers["x-baton-session"]
        for prompt in (PLAIN, PLAIN + " And it goes on.", "Not " + PLAIN)
    ]
    assert names[0] == names[1] != names[2]


# ---- tenants and the end --------------------------------------------------------------------------------------------
async def test_sessions_belong_to_the_tenant_of_the_key(
    house: House, http: httpx.AsyncClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    for tenant in ("alice", "bob"):
        (folder / tenant).write_text(f"{tenant}-key")
    prefill, decode = await house.pair()
    url = await house.serve(api_keys_folder=str(folder))
    alice, bob = ({"authorization": f"Bearer {tenant}-key"} for tenant in ("alice", "bob"))
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "cache_control": {**EPHEMERAL, "session": "s"}}
    for headers in (alice, bob):
        assert (await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)).status_code == 200
    assert [keep.tenant for keep in keeps(decode) if keep] == ["alice", "bob"]
    assert (await http.delete(f"{url}/v1/sessions/s")).status_code == 401
    assert (await http.delete(f"{url}/v1/sessions/s", headers=bob)).status_code == 200
    await eventually(lambda: bool(decode.sessions_ended and prefill.sessions_ended), "both were told")
    assert decode.sessions_ended == prefill.sessions_ended == [("bob", "s")]


@pytest.mark.parametrize("name", ["s", "a chat/no 1", "größe ☃ %2F", ".", "a?b#c"])
async def test_the_end_of_a_session_reaches_every_worker_each_time(
    house: House, http: httpx.AsyncClient, name: str
) -> None:
    await house.pair()
    await house.add(wire.ROLE_DECODE)
    url = await house.serve()
    for _ in range(2):
        answer = await http.delete(f"{url}/v1/sessions/{quote(name, safe='').replace('.', '%2E')}")
        assert answer.status_code == 200
        assert answer.json() == {"id": name, "object": "session.deleted", "deleted": True, "workers": 3}
    for worker in house.workers:
        await eventually(lambda worker=worker: len(worker.sessions_ended) == 2, "the worker was told twice")
        assert worker.sessions_ended == [("", name)] * 2


async def test_a_worker_that_is_away_is_not_counted(house: House, http: httpx.AsyncClient) -> None:
    _, decode = await house.pair()
    url = await house.serve()
    await decode.stop()
    router = house.router
    assert router is not None
    await eventually(lambda: len(router.fleet.registered()) == 1, "the loss was noticed")
    assert (await http.delete(f"{url}/v1/sessions/s")).json()["workers"] == 1


# ---- where a session is ---------------------------------------------------------------------------------------------
KEEP = wire.KvKeep(session="s", tenant="t", ttl_ms=60_000)
PAGES = [PageHash(bytes([number]) * 16) for number in range(6)]


def test_a_worker_keeps_what_the_newest_turn_began_with() -> None:
    homes = Homes(ManualClock())
    assert homes.kept_pages(KEEP, "a", PAGES) == 0
    homes.went(KEEP, "a", PAGES[:3])
    assert homes.kept_pages(KEEP, "a", PAGES) == 3
    assert homes.kept_pages(KEEP, "a", PAGES[:3]) == 3
    assert homes.kept_pages(KEEP, "b", PAGES) == 0, "another worker"
    assert homes.kept_pages(KEEP, "a", PAGES[:2]) == 2, "the conversation was cut short"
    assert homes.kept_pages(KEEP, "a", [*PAGES[:2], PAGES[5], PAGES[3]]) == 2, "its end was written anew"
    assert homes.kept_pages(KEEP, "a", [PAGES[4], *PAGES[1:]][:1]) == 0, "it was written anew"
    assert homes.kept_pages(wire.KvKeep(session="s", tenant="u"), "a", PAGES) == 0, "another tenant"
    homes.went(KEEP, "b", PAGES[:4])
    assert (homes.kept_pages(KEEP, "a", PAGES), homes.kept_pages(KEEP, "b", PAGES)) == (0, 4)
    homes.went(KEEP, "a", [])
    assert homes.kept_pages(KEEP, "b", PAGES) == 0, "less than a page is nothing"


def test_a_session_is_forgotten_when_it_ends_or_its_time_is_over() -> None:
    clock = ManualClock()
    homes = Homes(clock)
    homes.went(KEEP, "a", PAGES)
    clock.advance(60.0)
    assert homes.kept_pages(KEEP, "a", PAGES) == 6
    clock.advance(0.1)
    assert homes.kept_pages(KEEP, "a", PAGES) == 0
    homes.went(KEEP, "a", PAGES)
    homes.forget("s", "u")
    assert homes.kept_pages(KEEP, "a", PAGES) == 6
    homes.forget("s", "t")
    homes.forget("s", "t")
    assert homes.kept_pages(KEEP, "a", PAGES) == 0


async def test_the_next_turn_goes_where_the_one_before_was_kept(house: House, http: httpx.AsyncClient) -> None:
    """These workers tell nothing of their caches, and equal costs go round robin."""
    workers = [await house.add(wire.ROLE_COLOCATED) for _ in range(3)]
    url = await house.serve()
    for number in range(6):
        kept = {**EPHEMERAL, "session": "s"} if number else None
        prompt = list(range(100, 140 + 10 * number))
        await post(http, url, "completions", prompt=prompt, cache_control=kept)
    assert sorted(sum(keep is not None for keep in keeps(worker)) for worker in workers) == [0, 0, 5]
    assert (await http.delete(f"{url}/v1/sessions/s")).status_code == 200
    router = house.router
    assert router is not None
    assert router.fleet.homes.kept_pages(wire.KvKeep(session="s"), "any", PAGES) == 0


def test_memory_is_bounded() -> None:
    homes = Homes(ManualClock(), limit=2)
    keeps = [wire.KvKeep(session=str(number), ttl_ms=60_000) for number in range(3)]
    homes.went(keeps[0], "a", PAGES)
    homes.went(keeps[1], "a", PAGES)
    homes.went(keeps[0], "a", PAGES)
    homes.went(keeps[2], "a", PAGES)
    assert [homes.kept_pages(keep, "a", PAGES) for keep in keeps] == [6, 0, 6]
