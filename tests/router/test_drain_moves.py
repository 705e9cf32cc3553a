"""Real processes: a decode worker is told to stop in the middle of long streams, and these go on on another one.

No client sees an error, a token twice or a gap, nothing is computed again, and the worker is empty long before the
streams are. When the other worker or this one dies on the way, an ordinary retry takes over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI
from router.conftest import eventually
from support.checkpoints import tiny_checkpoint
from support.pd import no_page_is_held, status
from support.processes import Service, WorkerProcess, spawn_service

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 800
MOVED = 'baton_router_migrations_total{outcome="moved"}'
RETRIES = "baton_router_retries_total"
PROMPTS = [[(7 * number + 3 * index) % 290 + 10 for index in range(40 + 19 * number)] for number in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def processes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    settings = {"local_below_tokens": 0, "served_name": "tiny", "resume_wait_s": 120}
    with spawn_service(
        folder,
        checkpoint,
        prefill=1,
        decode=2,
        router_settings=settings,
        fixed_ports=True,
        drain_s=120,
        pages=1024,
    ) as made:
        yield made


@pytest.fixture
def service(processes: Service) -> Service:
    """All of them up, whatever the test before did to them."""
    for worker in processes.decode:
        if said(worker, "draining")():
            worker.wait(60)
        if worker.exit_code is not None:
            worker.start()
    for worker in processes.decode:
        worker.wait_ready()
    assert processes.router is not None
    processes.router.wait_workers(3)
    return processes


@pytest.fixture(scope="module")
def calm() -> list[list[str]]:
    """Tokens of the streams when nothing happens; the first test to ask for them fills it."""
    return []


@pytest.fixture
def client(service: Service) -> AsyncOpenAI:
    assert service.router is not None
    return AsyncOpenAI(base_url=f"{service.router.url}/v1", api_key="none", max_retries=0, timeout=300)


class Streams:
    """All prompts at once: even ones greedy, odd ones with a seed."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self.found: list[list[str]] = [[] for _ in PROMPTS]
        self.tasks = [asyncio.create_task(self._stream(number)) for number in range(len(PROMPTS))]

    async def _stream(self, number: int) -> None:
        stream = await self._client.completions.create(
            model="tiny", prompt=PROMPTS[number], max_tokens=TOKENS, stream=True, logprobs=0, seed=number,
            temperature=0.8 if number % 2 else 0, extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for chunk in stream:
            if chunk.choices[0].logprobs is not None:
                self.found[number] += chunk.choices[0].logprobs.tokens or []

    async def all(self) -> list[list[str]]:
        """Raises what a client saw go wrong."""
        await asyncio.gather(*self.tasks)
        return self.found

    async def under_way(self) -> None:
        await eventually(lambda: all(len(tokens) > 20 for tokens in self.found), "all are at it", limit_s=120)


async def undisturbed(client: AsyncOpenAI, calm: list[list[str]]) -> list[list[str]]:
    if not calm:
        calm += await Streams(client).all()
        assert all(len(tokens) == TOKENS for tokens in calm)
    return calm


async def busiest(service: Service) -> tuple[WorkerProcess, WorkerProcess]:
    """(the decode worker with the most requests, the other one)"""
    one, other = service.decode
    loads = [(await status(worker)).load.running for worker in (one, other)]
    return (one, other) if loads[0] >= loads[1] else (other, one)


async def counted(service: Service, series: str) -> float:
    assert service.router is not None
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{service.router.url}/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(series))


def said(worker: WorkerProcess, message: str) -> Callable[[], bool]:
    return lambda: any(record["message"] == message for record in worker.records())


async def test_streams_move_and_nothing_is_computed_again(
    service: Service, client: AsyncOpenAI, calm: list[list[str]]
) -> None:
    expected = await undisturbed(client, calm)
    moved, retried = await counted(service, MOVED), await counted(service, RETRIES)
    streams = Streams(client)
    await streams.under_way()
    source, target = await busiest(service)
    moving = (await status(source)).load.running
    computed = (await status(service.prefill[0])).load.steps
    assert moving > 0
    source.terminate()
    await eventually(said(source, "drained"), "the worker is empty", limit_s=120)
    assert min(map(len, streams.found)) < TOKENS - 100, "the drain waited for the streams"
    assert await streams.all() == expected
    assert await asyncio.to_thread(source.wait, 60) == 0
    assert (await status(service.prefill[0])).load.steps == computed
    assert await counted(service, MOVED) - moved == moving
    assert await counted(service, RETRIES) == retried
    for worker in (service.prefill[0], target):
        await no_page_is_held(worker)


@pytest.mark.parametrize("dies", ["source", "target"])
@pytest.mark.parametrize("after_s", [0.0, 0.1])
async def test_a_death_on_the_way_is_an_ordinary_retry(
    service: Service, client: AsyncOpenAI, calm: list[list[str]], dies: str, after_s: float
) -> None:
    expected = await undisturbed(client, calm)
    streams = Streams(client)
    await streams.under_way()
    source, target = await busiest(service)
    source.terminate()
    await asyncio.sleep(after_s)
    victim = source if dies == "source" else target
    victim.kill()
    await asyncio.to_thread(victim.wait)
    if dies == "target":  # what moved or was there before has nowhere to go until it is back
        victim.start()
    assert await streams.all() == expected
    for worker in (service.prefill[0], source, target):
        if worker.exit_code is None and not said(worker, "draining")():
            await asyncio.to_thread(worker.wait_ready)
            await no_page_is_held(worker)
