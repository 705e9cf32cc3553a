"""One running worker: gRPC server, tickers, drain. Everything here lives on one event loop.

State: STARTING -> SERVING -> DRAINING -> EMPTY, never back. Draining refuses new work with DRAINING, says so in Load,
and gives running requests time to finish or, on a decode worker, to move: routers abort them here and send PREFILL
with the ticket of another one. What is left then is handed back: failed with DRAINING, to be run elsewhere.
gRPC health knows two services: "" is liveness (false: stalled, restart me) and "baton.v1.Worker" is readiness (false
while starting, draining or stalled).
It does not load models and knows no roles; `process` builds the parts.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton_common.clock import Clock
from baton_common.errors import BatonError, ConfigError, Draining
from baton_proto import worker_pb2, worker_pb2_grpc
from baton_worker.config import WorkerConfig, split_address
from baton_worker.convert import PROTOCOL_VERSION
from baton_worker.desk import Desk, ProtocolViolation, Taking
from baton_worker.ports import EnginePort, WorkerRole
from baton_worker.state import Progress, State, load_message, page_counts, resident_bytes
from baton_worker.stream import RouterStream

log = logging.getLogger("baton.worker")

TICK_S = 0.25
HELLO_S = 10.0  # a stream says hello in this time or is closed
HAND_BACK_S = 10.0  # after the drain deadline: time for aborts, fences and the last messages
READY_SERVICE = "baton.v1.Worker"

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two workers on one port is a mistake, not a feature
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),  # a router that stopped without closing its connection
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # routers ping to notice a stopped worker
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker consists of once its model is loaded."""

    engine: EnginePort
    role: WorkerRole
    desk: Desk
    hello: worker_pb2.WorkerHello
    peers: Callable[[], Sequence[worker_pb2.PeerStatus]]
    tiers: Callable[[], Sequence[worker_pb2.TierStatus]]


class _Context(Protocol):
    """The part of grpc.aio.ServicerContext that is used here."""

    async def write(self, message: worker_pb2.WorkerMessage) -> None: ...
    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn: ...


class WorkerService:
    """Create, `listen`, `serve`, in the end `drain` and `close`. `on_failure` hears of a defect in the ticker."""

    def __init__(self, *, config: WorkerConfig, clock: Clock, on_failure: Callable[[BaseException], None]) -> None:
        self._config = config
        self._clock = clock
        self._on_failure = on_failure
        self._parts: Parts | None = None
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        self._progress = Progress(stall_s=config.stall_s, clock=clock)
        self._serials = itertools.count(1)
        self._load_sequence = itertools.count(1)
        self._ticker: asyncio.Task[None] | None = None
        self._drained: asyncio.Task[None] | None = None
        self.state = State.STARTING

    async def listen(self) -> tuple[str, int]:
        """Open the port: health and status answer, routers are told to come back. ConfigError when it is taken."""
        host, port = split_address(self._config.listen, "listen")
        worker_pb2_grpc.add_WorkerServicer_to_server(_Worker(self), self._server)
        worker_pb2_grpc.add_AdminServicer_to_server(_Admin(self), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._report_health()
        try:
            bound = self._server.add_insecure_port(self._config.listen)
        except RuntimeError:
            await self._server.stop(grace=None)
            raise ConfigError(
                f"cannot listen on {self._config.listen}: port {port} is in use; choose another --listen",
                param="listen",
            ) from None
        await self._server.start()
        return host, bound

    async def serve(self, parts: Parts) -> None:
        """The engine runs; take routers from now on."""
        self._parts = parts
        self.state = State.SERVING
        self._ticker = asyncio.create_task(self._tick_for_ever(parts), name="baton-ticker")
        self._ticker.add_done_callback(self._ticker_ended)
        await self._report_health()

    async def drain(self, grace_s: float) -> None:
        """Take nothing new and return when nothing is left. A second call joins the first, whose grace counts."""
        await asyncio.shield(self._begin_drain(grace_s))

    async def crashed(self, error: BatonError) -> None:
        """The engine is dead: say so to every router, as far as a second allows."""
        if self._parts is not None:
            self._parts.desk.fail_all(error)
            await self._flush(self._parts.desk, 1.0)

    async def close(self) -> None:
        """Close all streams and the port."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self._server.stop(grace=0.5)

    # ---- services ---------------------------------------------------------------------------------------------------
    async def connect(self, requests: AsyncIterator[worker_pb2.RouterMessage], context: _Context) -> None:
        """Worker.Connect: one router, from its hello to the end of its stream."""
        if self._parts is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is loading its model; come back")
        desk = self._parts.desk
        stream = await self._greet(requests, context)
        desk.join(stream)
        log.info("router connected", extra={"router": stream.router_id, "stream": stream.serial})
        reader = asyncio.create_task(_read(desk, stream, requests))
        writer = asyncio.create_task(stream.pump(context.write))
        broken = asyncio.create_task(stream.broken())
        try:
            await asyncio.wait({reader, writer, broken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost = len(stream.handles)
            desk.leave(stream)
            for task in (reader, writer, broken):
                task.cancel()
            results = await asyncio.gather(reader, writer, broken, return_exceptions=True)
            log.info("router left", extra={"router": stream.router_id, "stream": stream.serial, "aborted": lost})
        violation, _, slow = results
        if isinstance(violation, ProtocolViolation):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        if isinstance(slow, str):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, slow)

    async def _greet(self, requests: AsyncIterator[worker_pb2.RouterMessage], context: _Context) -> RouterStream:
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream starts with RouterHello")
        if first.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream starts with RouterHello")
        if first.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version differs: ours {PROTOCOL_VERSION}, theirs {first.hello.protocol_version}",
            )
        return RouterStream(
            serial=next(self._serials),
            router_id=first.hello.router_id,
            backlog=self._config.stream_backlog,
            stall_s=self._config.stream_stall_s,
            clock=self._clock,
        )

    def status(self) -> worker_pb2.StatusReply:
        """Admin.Status, also before the model is there."""
        parts = self._parts
        if parts is None:
            return worker_pb2.StatusReply(state=self.state.value, resident_bytes=resident_bytes())
        return worker_pb2.StatusReply(
            hello=parts.hello,
            load=self._load(parts),
            state=self.state.value,
            pages=page_counts(parts.engine.stats()),
            peers=parts.peers(),
            resident_bytes=resident_bytes(),
            tiers=parts.tiers(),
        )

    async def drain_progress(self, grace_s: float) -> AsyncIterator[worker_pb2.StatusReply]:
        """Admin.Drain: start it, and report until empty."""
        drained = self._begin_drain(grace_s)
        while not drained.done():
            yield self.status()
            await asyncio.wait({drained}, timeout=TICK_S)
        yield self.status()

    # ---- inside -----------------------------------------------------------------------------------------------------
    async def _tick_for_ever(self, parts: Parts) -> None:
        while True:
            self._progress.observe(parts.engine.stats())
            await self._report_health()
            self._broadcast_load(parts)
            await asyncio.sleep(TICK_S)

    def _ticker_ended(self, ticker: asyncio.Task[None]) -> None:
        error = None if ticker.cancelled() else ticker.exception()
        if error is not None:
            self._on_failure(error)

    def _load(self, parts: Parts) -> worker_pb2.Load:
        return load_message(
            parts.engine.stats(),
            sequence=next(self._load_sequence),
            handoffs=parts.role.handoffs(),
            draining=self.state in (State.DRAINING, State.EMPTY),
        )

    def _broadcast_load(self, parts: Parts) -> None:
        load = self._load(parts)
        for stream in parts.desk.streams:
            stream.send_load(load)

    async def _report_health(self) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        alive = self._progress.healthy
        await self._health.set("", serving if alive else not_serving)
        ready = alive and self.state is State.SERVING
        await self._health.set(READY_SERVICE, serving if ready else not_serving)

    def _begin_drain(self, grace_s: float) -> asyncio.Task[None]:
        if self._drained is None:
            self.state = State.DRAINING
            self._drained = asyncio.create_task(self._drain(grace_s), name="baton-drain")
        return self._drained

    async def _drain(self, grace_s: float) -> None:
        parts = self._parts
        await self._report_health()
        if parts is not None:
            desk = parts.desk
            desk.taking = Taking.DEPARTURES
            self._broadcast_load(parts)
            log.info("draining", extra={"open_requests": desk.open_requests, "grace_s": grace_s})
            emptied = await self._emptied(desk, grace_s)
            desk.taking = Taking.NOTHING
            if not emptied:
                log.warning("drain time is over; handing requests back", extra={"open_requests": desk.open_requests})
                desk.abort_all(
                    lambda request_id: Draining("the worker shuts down; run it elsewhere", request_id=request_id)
                )
                if not await self._emptied(desk, HAND_BACK_S):
                    log.error("requests did not end", extra={"open_requests": desk.open_requests})
            await self._flush(desk, 2.0)
            log.info("drained")
        self.state = State.EMPTY

    async def _emptied(self, desk: Desk, within_s: float) -> bool:
        deadline_s = self._clock.now() + within_s
        while desk.open_requests and self._clock.now() < deadline_s:
            await asyncio.sleep(0.02)
        return desk.open_requests == 0

    async def _flush(self, desk: Desk, within_s: float) -> None:
        waits = [asyncio.create_task(stream.flushed()) for stream in desk.streams]
        if waits:
            _, late = await asyncio.wait(waits, timeout=within_s)
            for task in late:
                task.cancel()


async def _read(desk: Desk, stream: RouterStream, requests: AsyncIterator[worker_pb2.RouterMessage]) -> None:
    async for message in requests:
        desk.receive(stream, message)


class _Worker:
    """baton.v1.Worker"""

    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def Connect(self, requests: AsyncIterator[worker_pb2.RouterMessage], context: _Context) -> None:
        await self._service.connect(requests, context)


class _Admin:
    """baton.v1.Admin"""

    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def Status(self, request: worker_pb2.StatusRequest, context: _Context) -> worker_pb2.StatusReply:
        return self._service.status()

    async def Drain(self, request: worker_pb2.DrainRequest, context: _Context) -> AsyncIterator[worker_pb2.StatusReply]:
        async for reply in self._service.drain_progress(request.deadline_ms / 1000):
            yield reply
