"""One link per worker: the gRPC stream that carries everything, kept up for ever.

Reconnects with back-off from 0.1 to 1 s. Incoming messages are dispatched by handle, synchronously, on the event loop:
one message per step, no task switch per token. When the stream breaks, every request on it hears `on_failed`; when no
message came for SUSPECT_S, or the step counter stands still for STALLED_S while there is work, each hears `on_silent`.
A retired link is not connected again. It does not know prompts, text or HTTP. Owner of its tasks: `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

import grpc

from baton_common.clock import Clock
from baton_common.errors import BatonError, ErrorKind
from baton_proto import PROTOCOL_VERSION
from baton_proto import worker_pb2 as wire
from baton_proto import worker_pb2_grpc as rpc
from baton_proto.common_pb2 import TokenLogprobs
from baton_proto.compat import pairing_key
from baton_router.index import PageIndex

log = logging.getLogger("baton.router.links")

SUSPECT_S = 3.0
LOST_S = 15.0
STALLED_S = 30.0
HELLO_S = 10.0
TICK_S = 0.5
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 1.0

_KINDS = dict(enumerate(ErrorKind, start=1))  # ErrorKind mirrors baton.v1.ErrorKind, whose 0 is unspecified

_ROLES = frozenset({wire.ROLE_PREFILL, wire.ROLE_DECODE, wire.ROLE_COLOCATED})

_CHANNEL = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


class WorkerLost(BatonError):
    """The stream broke under a request; what the worker did with it is unknown."""


class LinkState(Enum):
    CONNECTING = "connecting"
    UP = "up"
    SUSPECT = "suspect"  # connected, but silent or standing still
    REFUSED = "refused"  # speaks another protocol version


class Token(NamedTuple):
    """One output token as a worker reported it."""

    position: int
    token_id: int
    finish: wire.FinishReason
    logprobs: TokenLogprobs | None
    cached_tokens: int | None


class LegEvents(Protocol):
    """What a request hears about its part on one worker. Called on the event loop; must not block or raise."""

    def on_ticket(self, leg: Leg, ticket: wire.Ticket) -> None: ...
    def on_token(self, leg: Leg, token: Token) -> None: ...
    def on_failed(self, leg: Leg, error: BatonError) -> None: ...
    def on_silent(self, leg: Leg) -> None: ...
    def on_draining(self, leg: Leg) -> None: ...
    def on_defect(self, leg: Leg) -> None: ...


class Leg:
    """One request on one worker. `queued_tokens` counts as that worker's load until its first token."""

    __slots__ = ("events", "handle", "link", "queued_tokens")

    def __init__(self, link: Link, handle: int, events: LegEvents, queued_tokens: int) -> None:
        self.link = link
        self.handle = handle
        self.events = events
        self.queued_tokens = queued_tokens

    def abort(self, reason: str) -> None:
        """The worker is told to drop it; nothing more is heard. Idempotent."""
        self.link.close_leg(self, reason)

    def release(self) -> None:
        """Nothing more is heard; the worker is done with it. Idempotent."""
        self.link.close_leg(self, None)


class Link:
    """The state of one worker as this router sees it, and the way to it.

    `pod`: who has to answer at the address, because addresses of pods are used again; "" = anybody.
    """

    def __init__(
        self, address: str, router_id: str, clock: Clock, on_change: Callable[[], None], *, pod: str = ""
    ) -> None:
        self.address = address
        self.pod = pod
        self.retired = False  # gets no new requests; ends when its stream does
        self.state = LinkState.CONNECTING
        self.reason = "not connected yet"
        self.hello: wire.WorkerHello | None = None
        self.compat = b""
        self.load = wire.Load()
        self.pages = PageIndex()
        self._router_id = router_id
        self._clock = clock
        self._on_change = on_change
        self._handles = itertools.count(1)
        self._legs: dict[int, Leg] = {}
        self._queued_tokens = 0
        self._outbound: deque[wire.RouterMessage] = deque()
        self._outbound_ready = asyncio.Event()
        self._heard_at_s = 0.0
        self._stepped_at_s = 0.0
        self._snapshot_wanted = False

    @property
    def key(self) -> str:
        """Names this life of the worker; another process start gets another key."""
        return f"{self.hello.worker_id}/{self.hello.incarnation}" if self.hello else self.address

    @property
    def up(self) -> bool:
        return self.state is LinkState.UP

    @property
    def open_legs(self) -> int:
        return len(self._legs)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens this router sent that have not produced a first token."""
        return self._queued_tokens

    # ---- requests

    def submit(self, message: wire.Submit, events: LegEvents, queued_tokens: int) -> Leg:
        """Queue a submission on a stream that is up; sets the message's handle. Failure is heard through `events`."""
        leg = Leg(self, next(self._handles), events, queued_tokens)
        message.handle = leg.handle
        self._legs[leg.handle] = leg
        self._queued_tokens += queued_tokens
        self._send(wire.RouterMessage(submit=message))
        return leg

    def end_session(self, session: str, tenant: str) -> None:
        """Its KV need not be kept. For a link whose stream is up."""
        self._send(wire.RouterMessage(session_end=wire.SessionEnd(session=session, tenant=tenant)))

    def close_leg(self, leg: Leg, abort_reason: str | None) -> None:
        if self._legs.get(leg.handle) is not leg:
            return
        del self._legs[leg.handle]
        self._settle(leg)
        if abort_reason is not None:
            self._send(wire.RouterMessage(abort=wire.Abort(handle=leg.handle, reason=abort_reason)))

    def _settle(self, leg: Leg) -> None:
        self._queued_tokens -= leg.queued_tokens
        leg.queued_tokens = 0

    def _send(self, message: wire.RouterMessage) -> None:
        self._outbound.append(message)
        self._outbound_ready.set()

    # ---- life of the stream

    async def run(self) -> None:
        """Connects for ever; ends by cancellation, and when the stream of a retired link breaks."""
        backoff_s = BACKOFF_MIN_S
        while True:
            greeted = False
            try:
                await self._session()
            except (grpc.aio.AioRpcError, OSError, EOFError, TimeoutError, BatonError) as error:
                greeted = self.hello is not None
                self._lost(_reason(error), refused=isinstance(error, BatonError))
            except Exception:
                log.exception("link to %s failed unexpectedly", self.address)
                self._lost("internal error of the router", refused=False)
            if self.retired:
                return
            backoff_s = BACKOFF_MIN_S if greeted else min(backoff_s * 2, BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _session(self) -> None:
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL) as channel:
            call = rpc.WorkerStub(channel).Connect()
            tasks: list[asyncio.Task[None]] = []
            try:
                hello = wire.RouterHello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
                async with asyncio.timeout(HELLO_S):
                    await call.write(wire.RouterMessage(hello=hello))
                    first = await call.read()
                if first is grpc.aio.EOF:
                    await self._raise_status(call)
                self._greeted(first)
                tasks = [asyncio.create_task(part) for part in (self._read(call), self._write(call), self._watch())]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()

    async def _read(self, call: grpc.aio.StreamStreamCall[wire.RouterMessage, wire.WorkerMessage]) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                await self._raise_status(call)
            self._dispatch(message)

    async def _raise_status(self, call: grpc.aio.StreamStreamCall[wire.RouterMessage, wire.WorkerMessage]) -> None:
        code, details = await call.code(), await call.details()
        raise EOFError(f"the worker closed the stream ({code.name.lower()}{': ' + details if details else ''})")

    async def _write(self, call: grpc.aio.StreamStreamCall[wire.RouterMessage, wire.WorkerMessage]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader hears why
            while True:
                await self._outbound_ready.wait()
                self._outbound_ready.clear()
                while self._outbound:
                    await call.write(self._outbound.popleft())

    def _greeted(self, first: wire.WorkerMessage) -> None:
        hello = first.hello
        if first.WhichOneof("kind") != "hello" or hello.role not in _ROLES:
            raise BatonError(f"{self.address} did not introduce itself; is it a Baton worker?")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise BatonError(
                f"protocol_version differs: ours {PROTOCOL_VERSION}, theirs {hello.protocol_version}; upgrade the older"
            )
        if self.pod and hello.worker_id != self.pod:
            raise BatonError(
                f"{self.address} should be pod {self.pod}, but {hello.worker_id} answers there; waiting for its "
                "EndpointSlice to follow (--worker-id of a worker must be the name of its pod)"
            )
        self.hello = hello
        self.compat = pairing_key(hello.compat)
        self.load = wire.Load()
        self.pages = PageIndex()
        self._outbound.clear()
        self._heard_at_s = self._stepped_at_s = self._clock.now()
        self._set_state(LinkState.UP, "")
        log.info("worker %s is up", self.key, extra={"address": self.address, "role": wire.Role.Name(hello.role)})

    def _lost(self, reason: str, *, refused: bool) -> None:
        if self.hello is not None or self.reason != reason:
            log.warning("worker %s is not reachable: %s", self.key, reason, extra={"address": self.address})
        worker = self.key
        self.hello = None
        self._set_state(LinkState.REFUSED if refused else LinkState.CONNECTING, reason)
        legs, self._legs = list(self._legs.values()), {}
        self._queued_tokens = 0
        self._outbound.clear()
        for leg in legs:
            self._tell(leg, leg.events.on_failed, WorkerLost(f"worker {worker} was lost: {reason}"))

    async def _watch(self) -> None:
        """Liveness. Repeats `on_silent` while it lasts, because a way out may appear later; in the end it hangs up."""
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.now()
            silent_s, still_s = now_s - self._heard_at_s, now_s - self._stepped_at_s
            working = self.load.running + self.load.queued_requests > 0
            if silent_s > LOST_S:
                raise EOFError(f"silent for {silent_s:.1f} s")
            if silent_s > SUSPECT_S:
                self._suspect(f"silent for {silent_s:.1f} s")
            elif working and still_s > STALLED_S:
                self._suspect(f"no step for {still_s:.1f} s")
            elif self.state is LinkState.SUSPECT:
                self._set_state(LinkState.UP, "")

    def _suspect(self, reason: str) -> None:
        if self.state is not LinkState.SUSPECT:
            log.warning("worker %s is suspect: %s", self.key, reason)
        self._set_state(LinkState.SUSPECT, reason)
        for leg in list(self._legs.values()):
            self._tell(leg, leg.events.on_silent)

    def _set_state(self, state: LinkState, reason: str) -> None:
        changed, self.state, self.reason = state is not self.state, state, reason
        if changed:
            self._on_change()

    # ---- messages

    def _dispatch(self, message: wire.WorkerMessage) -> None:
        self._heard_at_s = self._clock.now()
        kind = message.WhichOneof("kind")
        if kind == "tokens":
            self._on_tokens(message.tokens)
        elif kind == "load":
            self._on_load(message.load)
        elif kind == "kv_events":
            in_step = self.pages.apply(message.kv_events)
            if message.kv_events.snapshot:
                self._snapshot_wanted = False
            elif not in_step and not self._snapshot_wanted:
                self._want_snapshot()
        elif kind == "ticket":
            leg = self._legs.get(message.ticket.handle)
            if leg is not None:
                self._tell(leg, leg.events.on_ticket, message.ticket)
        elif kind == "failed":
            leg = self._legs.pop(message.failed.handle, None)
            if leg is not None:
                self._settle(leg)
                error = message.failed.error
                self._tell(leg, leg.events.on_failed, BatonError(
                    error.message,
                    kind=_KINDS.get(error.kind, ErrorKind.INTERNAL),
                    param=error.param,
                    retry_after_ms=error.retry_after_ms,
                ))  # fmt: skip

    def _on_tokens(self, tokens: wire.Tokens) -> None:
        legs = self._legs
        finishes = {item.entry: item.reason for item in tokens.finishes}
        logprobs = {item.entry: item.logprobs for item in tokens.logprobs}
        cached = {item.entry: item.cached_tokens for item in tokens.cached}
        columns = zip(tokens.handles, tokens.positions, tokens.token_ids, strict=True)
        for entry, (handle, position, token_id) in enumerate(columns):
            leg = legs.get(handle)
            if leg is None:
                continue
            if leg.queued_tokens:
                self._settle(leg)
            finish = finishes.get(entry, wire.FINISH_REASON_UNSPECIFIED)
            token = Token(position, token_id, finish, logprobs.get(entry), cached.get(entry))
            self._tell(leg, leg.events.on_token, token)

    def _on_load(self, load: wire.Load) -> None:
        if load.steps != self.load.steps or not (load.running or load.queued_requests):
            self._stepped_at_s = self._heard_at_s
        drained = load.draining != self.load.draining
        self.load = load
        if drained:
            self._on_change()
        if load.draining:  # again with each report: room elsewhere may appear later
            for leg in list(self._legs.values()):
                self._tell(leg, leg.events.on_draining)

    def _want_snapshot(self) -> None:
        self._snapshot_wanted = True
        self._send(wire.RouterMessage(kv_snapshot=wire.KvSnapshotRequest()))

    def _tell(self, leg: Leg, hear: Callable[..., None], *facts: object) -> None:
        """A defect in one request must not take the link, and every other request, down."""
        try:
            hear(leg, *facts)
        except Exception:
            log.exception("request failed while hearing from worker %s", self.key)
            self.close_leg(leg, "defect in the router")
            leg.events.on_defect(leg)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        details = " ".join((error.details() or "").split())
        if details.startswith("failed to connect"):  # gRPC's own long story about addresses and sockets
            return "nothing answers at its address yet"
        return f"{error.code().name.lower()}: {details[:160]}"
    if isinstance(error, TimeoutError):
        return f"no hello within {HELLO_S:.0f} s"
    return str(error)
