"""A mirror of Kubernetes objects against a scripted API server: all the ways in which a watch ends; none is the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from baton_common.clock import SystemClock
from baton_common.kube import mirror
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials
from baton_common.kube.kinds import POD
from baton_common.kube.mirror import Mirror, backoff_s
from baton_common.kube.objects import Object, text

Script = Callable[["Api", web.StreamResponse], Awaitable[None]]
LIMIT_S = 20.0


def pod(name: str, version: int, **more: str) -> dict[str, object]:
    return {"metadata": {"namespace": "ns", "name": name, "resourceVersion": str(version), **more}}


def status(code: int, message: str = "so it is") -> dict[str, object]:
    return {"kind": "Status", "code": code, "message": message, "reason": "Because"}


@dataclass
class Api:
    """Answers lists with `pods`, and the n-th watch with the n-th of `watches`; the last one is repeated."""

    pods: list[dict[str, object]] = field(default_factory=lambda: [pod("a", 1)])
    watches: list[Script] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)  # verb -> status
    lists: int = 0
    versions: list[str] = field(default_factory=list)  # from which each watch began
    queries: list[dict[str, str]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        watching = "watch" in request.query
        if code := self.refuse.get("watch" if watching else "list"):
            return web.json_response(status(code, "you may not"), status=code)
        if not watching:
            self.lists += 1
            return web.json_response({"metadata": {"resourceVersion": "10"}, "items": self.pods})
        self.versions.append(request.query["resourceVersion"])
        self.queries.append(dict(request.query))
        response = web.StreamResponse()
        await response.prepare(request)
        await self.watches[min(len(self.versions), len(self.watches)) - 1](self, response)
        return response


def events(*items: tuple[str, dict[str, object]]) -> Script:
    """Send these, then end the watch as at its time limit."""

    async def play(api: Api, response: web.StreamResponse) -> None:
        for kind, item in items:
            await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")

    return play


async def stay(api: Api, response: web.StreamResponse) -> None:
    """Nothing happens any more."""
    await api.over.wait()


async def cut(api: Api, response: web.StreamResponse) -> None:
    """The connection breaks in the middle of a line."""
    await response.write(b'{"type": "ADDED", "obj')
    assert response._req is not None
    assert response._req.transport is not None
    response._req.transport.abort()


@dataclass
class Seen:
    names: list[list[str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    last: Collection[Object] = ()

    def changed(self, objects: Collection[Object]) -> None:
        self.last = list(objects)
        self.names.append(sorted(text(item, "metadata", "name") for item in objects))

    async def until(self, what: str, true: Callable[[], bool]) -> None:
        end_s = asyncio.get_running_loop().time() + LIMIT_S
        while not true():
            assert asyncio.get_running_loop().time() < end_s, f"never: {what}; seen {self.names}, {self.troubles}"
            await asyncio.sleep(0.005)


@asynccontextmanager
async def mirrored(api: Api, *, watch_s: int = 30) -> AsyncIterator[Seen]:
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/ns/pods", api.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    seen = Seen()
    credentials = Credentials(server=f"http://127.0.0.1:{port}", namespace="ns")
    async with KubeClient(credentials, manager="test", clock=SystemClock()) as client:
        kept = Mirror(
            client, POD, "ns", selector="app=x", changed=seen.changed, troubled=seen.troubles.append,
            clock=SystemClock(), random=lambda: 0.0, watch_s=watch_s,
        )  # fmt: skip
        running = asyncio.create_task(kept.run())
        try:
            yield seen
            assert not running.done(), "it ended"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            api.over.set()
    await runner.cleanup()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_s, "__kwdefaults__", {"least_s": 0.01, "most_s": 0.05})


async def test_a_list_and_what_changes_after_it() -> None:
    changes = events(("ADDED", pod("b", 11)), ("MODIFIED", pod("a", 12, uid="new")), ("DELETED", pod("b", 13)))
    api = Api(watches=[changes, stay])
    async with mirrored(api) as seen:
        await seen.until("the second watch", lambda: len(api.versions) == 2)
    assert seen.names == [["a"], ["a", "b"], ["a", "b"], ["a"]]
    assert [text(item, "metadata", "uid") for item in seen.last] == ["new"]
    assert api.versions == ["10", "13"], "it goes on where it was"
    assert api.lists == 1
    assert api.queries[0]["labelSelector"] == "app=x"
    assert api.queries[0]["allowWatchBookmarks"] == "true"
    assert api.queries[0]["timeoutSeconds"] == "30"


async def test_a_bookmark_moves_the_version_and_changes_nothing() -> None:
    api = Api(watches=[events(("BOOKMARK", {"metadata": {"resourceVersion": "99"}})), stay])
    async with mirrored(api) as seen:
        await seen.until("the second watch", lambda: len(api.versions) == 2)
    assert api.versions == ["10", "99"]
    assert seen.names == [["a"]]


@pytest.mark.parametrize("end", [events(("ERROR", status(410, "too old"))), cut, events(("ERROR", status(500)))])
async def test_whatever_ends_a_watch_is_answered_with_a_new_list(end: Script) -> None:
    async def vanish(api: Api, response: web.StreamResponse) -> None:
        api.pods = [pod("z", 20)]  # happens where no event tells it
        await end(api, response)

    api = Api(watches=[vanish, stay])
    async with mirrored(api) as seen:
        await seen.until("the new list", lambda: seen.names[-1:] == [["z"]])
        await seen.until("all is well", lambda: not seen.troubles or seen.troubles[-1] == "")
    assert api.lists == 2


async def test_a_version_that_the_server_refuses_is_answered_with_a_new_list() -> None:
    api = Api(watches=[stay], refuse={"watch": 410})
    async with mirrored(api) as seen:
        await seen.until("lists again", lambda: api.lists > 1)
        api.refuse.clear()
        await seen.until("a watch", lambda: len(api.versions) == 1)
    assert not any(seen.troubles), "nobody has to know"


async def test_a_silent_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SILENCE_S", -0.8)
    api = Api(watches=[stay, events(("ADDED", pod("b", 11))), stay])
    async with mirrored(api, watch_s=1) as seen:
        await seen.until("news", lambda: seen.names[-1:] == [["a", "b"]])
    assert any("does not answer" in line for line in seen.troubles)


async def test_a_line_may_be_longer_than_any_buffer() -> None:
    big = pod("b", 11, annotation="x" * 400_000)
    async with mirrored(Api(watches=[events(("ADDED", big)), stay])) as seen:
        await seen.until("the big one", lambda: seen.names[-1:] == [["a", "b"]])


@pytest.mark.parametrize(("code", "remedy"), [(403, "get, list and watch on pods"), (401, "ServiceAccount"), (500, "")])
async def test_a_refusal_keeps_what_is_known_and_is_told_once(
    code: int, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton.kube.mirror")

    async def refused_from_now_on(api: Api, response: web.StreamResponse) -> None:
        api.refuse = {"list": code, "watch": code}
        await cut(api, response)

    api = Api(watches=[refused_from_now_on, events(("ADDED", pod("b", 11))), stay])
    async with mirrored(api) as seen:
        await seen.until("refused often", lambda: sum("you may not" in line for line in seen.troubles) > 3)
        assert seen.names == [["a"]], "what was known stays"
        assert remedy in seen.troubles[-1]
        api.refuse = {}
        await seen.until("it follows again", lambda: seen.names[-1:] == [["a", "b"]])
        assert seen.troubles[-1] == ""
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("you may not" in line for line in warned) == 1


async def test_where_watching_is_forbidden_lists_keep_it_up_to_date() -> None:
    api = Api(watches=[stay], refuse={"watch": 403})
    async with mirrored(api) as seen:
        await seen.until("the first list", lambda: seen.names == [["a"]])
        api.pods = [pod("b", 2)]
        await seen.until("the next list", lambda: seen.names[-1] == ["b"])
        assert "watch" in seen.troubles[-1]


async def test_nonsense_is_an_error_like_any_other() -> None:
    async def nonsense(api: Api, response: web.StreamResponse) -> None:
        await response.write(b"<html>\n")

    async with mirrored(Api(watches=[nonsense, events(("ADDED", pod("b", 11))), stay])) as seen:
        await seen.until("news", lambda: seen.names[-1:] == [["a", "b"]])


@pytest.mark.parametrize("failures", [1, 2, 5, 50, 5000])
def test_pauses_grow_to_a_limit_and_are_spread(failures: int) -> None:
    shortest, longest = (backoff_s(failures, chance, least_s=0.25, most_s=15.0) for chance in (0.0, 0.999))
    middle = min(0.25 * 2.0 ** min(failures - 1, 20), 15.0)
    assert shortest == middle / 2
    assert middle < longest < 1.5 * middle
