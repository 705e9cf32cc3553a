"""A tiny checkpoint, fake workers, and a router on a real HTTP server, all on the test's own event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI
from router.fake_worker import Cluster, FakeWorker
from support.checkpoints import write_tokenizer

from baton_proto import worker_pb2 as wire
from baton_router.api.app import create_app
from baton_router.checkpoint import Checkpoint, load_checkpoint
from baton_router.config import RouterConfig
from baton_router.service import Router

CONTEXT_TOKENS = 512
MODEL = "tiny"
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a router reads of a checkpoint; it has no weights."""
    path: Path = tmp_path_factory.mktemp("model") / MODEL
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": 320, "max_position_embeddings": CONTEXT_TOKENS}))
    write_tokenizer(path, 320, CONTEXT_TOKENS)
    return path


@pytest.fixture(scope="session")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(str(folder))


async def eventually(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Wait until a fact is there; the limit only bounds a failing test."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    while not condition():
        assert loop.time() < end_s, f"never came true: {what}"
        await asyncio.sleep(0.002)


@dataclass
class House:
    """A router over fakes. `serve` adds the HTTP server."""

    checkpoint: Checkpoint
    cluster: Cluster = field(default_factory=Cluster)
    workers: list[FakeWorker] = field(default_factory=list)
    config: RouterConfig = field(default_factory=lambda: RouterConfig(
        served_name=MODEL, worker_wait_s=0.3, resume_wait_s=2.0, local_below_tokens=0, request_timeout_s=20.0
    ))  # fmt: skip
    router: Router | None = None
    url: str = ""
    _server: uvicorn.Server | None = None
    _serving: asyncio.Task[None] | None = None

    async def add(self, role: wire.Role, **options: object) -> FakeWorker:
        worker = FakeWorker(role, self.cluster, **options)  # type: ignore[arg-type]
        self.workers.append(await worker.start())
        return worker

    async def pair(self, **options: object) -> tuple[FakeWorker, FakeWorker]:
        """(prefill, decode)"""
        return await self.add(wire.ROLE_PREFILL, **options), await self.add(wire.ROLE_DECODE, **options)

    async def route(self, addresses: list[str] | None = None, **settings: object) -> Router:
        """Start the router and wait until it sees every worker."""
        known = tuple(worker.address for worker in self.workers) if addresses is None else tuple(addresses)
        self.config = replace(self.config, workers=known, **settings)  # type: ignore[arg-type]
        router = self.router = Router(self.config, self.checkpoint)
        router.start()
        if addresses is None:
            await eventually(
                lambda: all(link.hello and link.load.total_pages for link in router.fleet.links), "links up"
            )
        return router

    async def serve(self, addresses: list[str] | None = None, **settings: object) -> str:
        """Start the router behind a real server; returns its URL."""
        router = await self.route(addresses, **settings)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(router), http="httptools", lifespan="off", log_config=None)
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server._serve([listener]))  # without its signal handlers
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return self.url

    def client(self, **options: object) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)  # type: ignore[arg-type]

    async def close(self) -> None:
        if self._server is not None and self._serving is not None:
            self._server.force_exit = self._server.should_exit = True
            await self._serving
        if self.router is not None:
            await self.router.stop()
        for worker in self.workers:
            await worker.stop()


@pytest.fixture
async def house(checkpoint: Checkpoint) -> AsyncIterator[House]:
    made = House(checkpoint)
    yield made
    await made.close()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


def chat_ids(house: House, messages: list[dict[str, str]] = HELLO) -> list[int]:
    """Token ids of a chat prompt."""
    template = house.checkpoint.template
    assert template is not None
    return list(house.checkpoint.tokenizer.encode(template.render(messages), add_special_tokens=False).ids)
