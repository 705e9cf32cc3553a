"""Routers that are replaced under load, as by a rollout: two behind a Service, sixteen OpenAI clients, no error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from router.conftest import eventually
from router.fake_worker import Cluster, FakeWorker
from support.processes import RouterProcess, free_ports

from baton_proto import worker_pb2 as wire

pytestmark = [pytest.mark.process, pytest.mark.slow]

CLIENTS = 16
OUTPUTS = 30
TICK_S = 0.05
POLL_S = 0.2
WAIT_S = 60.0


class Balancer:
    """As a Service does it: a new connection goes to a router that was ready when it was last asked."""

    def __init__(self, addresses: list[str]) -> None:
        self.ready: list[str] = []
        self.connections: dict[str, int] = dict.fromkeys(addresses, 0)
        self.url = ""
        self._addresses = addresses
        self._turn = itertools.count()
        self._pipes: set[asyncio.Task[None]] = set()

    def takes(self, address: str) -> bool:
        return address in self.ready

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Balancer]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        poller = asyncio.create_task(self._poll())
        try:
            yield self
        finally:
            poller.cancel()
            server.close()
            for pipe in self._pipes:
                pipe.cancel()
            await asyncio.gather(poller, *self._pipes, return_exceptions=True)

    async def _poll(self) -> None:
        while True:
            self.ready = [address for address in self._addresses if await status(address) == 200]
            await asyncio.sleep(POLL_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = self.ready
        if not ready:
            writer.transport.abort()
            return
        address = ready[next(self._turn) % len(ready)]
        self.connections[address] += 1
        host, port = address.split(":")
        try:
            inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, inner_writer), (inner_reader, writer)):
            task = asyncio.create_task(pump(source, sink))
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(1 << 16):
            sink.write(chunk)
            await sink.drain()
    with contextlib.suppress(OSError):
        sink.close()


async def status(address: str) -> int:
    """Of /ready over a new connection, like the kubelet; 0 = nothing answers."""
    try:
        async with httpx.AsyncClient(timeout=10) as http:
            return (await http.get(f"http://{address}/ready")).status_code
    except httpx.TransportError:
        return 0


class Load:
    """Clients that ask again and again; each answer must be whole and the same as the first one to its prompt."""

    def __init__(self, url: str) -> None:
        self.answers = 0
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=WAIT_S)
        self._texts: dict[int, str] = {}
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def finish(self) -> None:
        """Raises what any client met."""
        self._over.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()

    async def more(self, answers: int) -> None:
        """Until so many more answers came; raises what a client met meanwhile."""
        goal = self.answers + answers
        await eventually(
            lambda: self.answers >= goal or any(task.done() for task in self._tasks), "answers", limit_s=WAIT_S
        )
        for task in self._tasks:
            if task.done():
                task.result()

    async def _ask(self, number: int) -> None:
        while not self._over.is_set():
            stream = await self._client.completions.create(
                model="m", prompt=[100 + number], max_tokens=OUTPUTS, stream=True
            )
            text, finish = "", None
            async for chunk in stream:
                text += chunk.choices[0].text
                finish = chunk.choices[0].finish_reason or finish
            assert finish == "length", "a stream that ended early"
            assert self._texts.setdefault(number, text) == text
            self.answers += 1


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    made = await FakeWorker(wire.ROLE_COLOCATED, Cluster(), tick_s=TICK_S).start()
    yield made
    await made.stop()


def router_at(port: int, worker: FakeWorker, model: Path, folder: Path) -> RouterProcess:
    return RouterProcess(
        model, folder, workers=[worker.address], name=f"router-{port}", listen=f"127.0.0.1:{port}", served_name="m",
        worker_wait_s=20, drain_s=30,
    )  # fmt: skip


async def up(process: RouterProcess) -> None:
    await asyncio.to_thread(process.start().wait_ready)


async def gone(process: RouterProcess) -> int:
    return await asyncio.to_thread(process.wait, WAIT_S)


async def test_a_rollout_of_all_routers_is_seen_by_no_client(worker: FakeWorker, folder: Path, tmp_path: Path) -> None:
    routers = [router_at(port, worker, folder, tmp_path) for port in free_ports(2)]
    with ExitStack() as stack:
        for router in routers:
            stack.callback(router.close)
            await up(router)
        balancer = Balancer([router.address for router in routers])
        async with balancer.running():
            await eventually(lambda: len(balancer.ready) == 2, "both are ready", WAIT_S)
            load = Load(balancer.url)
            load.start()
            await load.more(CLIENTS)
            for router in routers:
                address = router.address
                router.terminate()
                await load.more(2 * CLIENTS)
                assert await gone(router) == 0, router.log()
                assert "Traceback" not in router.log()
                await up(router)
                await eventually(partial(balancer.takes, address), "it takes connections again", WAIT_S)
            await load.finish()
    assert all(count > 0 for count in balancer.connections.values())


async def test_the_way_out_of_one_router(worker: FakeWorker, folder: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    router = router_at(port, worker, folder, tmp_path)
    with ExitStack() as stack:
        stack.callback(router.close)
        await up(router)
        client = openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=0)
        async with client, httpx.AsyncClient(timeout=WAIT_S) as kept:
            assert (await kept.get(f"{router.url}/v1/models")).status_code == 200
            stream = await client.completions.create(model="m", prompt=[100], max_tokens=OUTPUTS, stream=True)
            await anext(stream)
            worker.script.hold = True  # the answer stays open for as long as we look
            router.terminate()
            address = router.address
            async with asyncio.timeout(WAIT_S):
                while await status(address) == 200:
                    await asyncio.sleep(POLL_S)
            assert await status(address) == 503, "it still answers new connections, to say that it leaves"
            answer = await kept.get(f"{router.url}/v1/models")
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            worker.script.hold = False
            rest = [chunk async for chunk in stream]
            assert rest[-1].choices[0].finish_reason == "length"
        assert await gone(router) == 0, router.log()
