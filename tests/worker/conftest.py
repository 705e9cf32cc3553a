"""A worker on loopback with a scripted engine: real gRPC, real threads, no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
from support.router_client import RouterClient
from support.scripted_engine import LAYERS, PAGE_TOKENS, ScriptedEngine

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_decode.role import DecodeRole
from baton_kvtransfer.records import FirstToken, Inbound, Outbound, Pull
from baton_prefill.role import PrefillRole
from baton_proto import common_pb2, worker_pb2
from baton_worker.config import WorkerConfig
from baton_worker.convert import PROTOCOL_VERSION
from baton_worker.desk import Desk
from baton_worker.outbox import Outbox
from baton_worker.service import Parts, WorkerService

COMPAT = common_pb2.Compat(
    protocol_version=1, model_digest="digest", compute_dtype="float32", kv_dtype="float32", page_tokens=PAGE_TOKENS,
    layers=LAYERS, kv_heads=2, head_dim=16, layout="page_layer_kv_head_token_dim", rope="rope", tp_size=1,
)  # fmt: skip


@dataclass
class FakeFence:
    """Done when told so."""

    passed: bool = True

    def done(self) -> bool:
        return self.passed


@dataclass
class FakeTransfer:
    outbound: Outbound
    fence: FakeFence
    ready_calls: list[tuple[int, int, int, int]] = field(default_factory=list)
    finished: FirstToken | None = None
    finishes: int = 0
    aborted: BatonError | None = None
    unsent_tokens: int = 0

    def ready(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int) -> None:
        self.ready_calls.append((layer_begin, layer_end, token_begin, token_end))

    def finish(self, first: FirstToken | None) -> None:
        self.finished = first
        self.finishes += 1

    def abort(self, error: BatonError) -> FakeFence:
        self.aborted = error
        return self.fence


@dataclass
class FakeEndpoint:
    """Remembers what it was asked; the test plays the other worker."""

    fence: FakeFence = field(default_factory=FakeFence)
    expected: dict[TransferId, Inbound] = field(default_factory=dict)
    cancelled: dict[TransferId, BatonError] = field(default_factory=dict)
    opened: list[FakeTransfer] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)

    def expect(self, inbound: Inbound) -> None:
        self.expected[inbound.transfer_id] = inbound

    def cancel(self, transfer_id: TransferId, error: BatonError) -> FakeFence:
        self.cancelled[transfer_id] = error
        return self.fence

    def open(self, outbound: Outbound) -> FakeTransfer:
        self.opened.append(FakeTransfer(outbound, self.fence))
        return self.opened[-1]

    def pull(self, pull: Pull) -> None:
        self.pulls.append(pull)


@dataclass
class Bench:
    """One worker under test."""

    service: WorkerService
    desk: Desk
    engine: ScriptedEngine
    role: DecodeRole | PrefillRole
    endpoint: FakeEndpoint
    address: str

    def router(self, router_id: str = "test-router") -> RouterClient:
        return RouterClient(self.address, router_id=router_id)


Worker = Callable[..., Awaitable[Bench]]


@asynccontextmanager
async def running_worker(
    *, kind: str = "decode", peers: bool = True, step_s: float = 0.001, **settings: object
) -> AsyncIterator[Bench]:
    clock = SystemClock()
    outbox = Outbox(asyncio.get_running_loop())
    role = DecodeRole(outbox=outbox, incarnation="inc") if kind == "decode" else PrefillRole(outbox=outbox, clock=clock)
    engine, endpoint = ScriptedEngine(role, step_s=step_s), FakeEndpoint()
    role.bind(engine=engine, endpoint=endpoint if peers else None, compat=COMPAT)
    service = WorkerService(config=WorkerConfig(listen="127.0.0.1:0", **settings), clock=clock, on_failure=_raise)
    host, port = await service.listen()
    hello = worker_pb2.WorkerHello(
        protocol_version=PROTOCOL_VERSION, worker_id="w", incarnation="inc", role=worker_pb2.ROLE_DECODE, compat=COMPAT,
        model_name="scripted", context_tokens=1024, hash_root=b"r" * 16, peer_address="127.0.0.1:7" if peers else "",
    )  # fmt: skip
    desk = Desk(engine=engine, role=role, hello=hello, clock=clock)
    outbox.open(desk.deliver)
    engine.start()
    await service.serve(Parts(engine=engine, role=role, desk=desk, hello=hello, peers=_no_peers, tiers=list))
    try:
        yield Bench(service, desk, engine, role, endpoint, f"{host}:{port}")
    finally:
        endpoint.fence.passed = True
        engine.may_step.set()
        await asyncio.to_thread(engine.stop)
        await service.close()
        outbox.close()


def _raise(error: BaseException) -> None:
    raise error


def _no_peers() -> Sequence[worker_pb2.PeerStatus]:
    return []


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    """`await worker(kind="prefill", ...)` starts one; all end with the test."""
    async with AsyncExitStack() as stack:

        async def start(**settings: object) -> Bench:
            return await stack.enter_async_context(running_worker(**settings))

        yield start
