"""A scripted worker over real gRPC: says hello, reserves, prefills, decodes with a deterministic token function.

Two fakes of one `Cluster` hand over to each other like real ones: the prefill fake calls the decode fake's reservation.
One tick makes one token for everything that runs and sends it as one message, like a step of the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton_common.hashing import token_bytes, tokens_from_bytes
from baton_proto import common_pb2
from baton_proto import worker_pb2 as wire
from baton_proto import worker_pb2_grpc as rpc

TokenFunction = Callable[[list[int], int], int]
"""(all tokens so far, prompt tokens) -> next token id"""

FIRST_LETTER, LETTERS = 40, 50
EOS_ID = 2


def chained(tokens: list[int], prompt_tokens: int) -> int:
    """Depends on every token before it, so that a wrong continuation cannot go unseen."""
    return FIRST_LETTER + zlib.crc32(token_bytes(tokens)) % LETTERS


def expected(prompt: list[int], count: int, function: TokenFunction = chained) -> list[int]:
    """The outputs a correct run gives."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(function(tokens, len(prompt)))
    return tokens[len(prompt) :]


@dataclass
class Running:
    """One request on one fake."""

    stream: Stream
    handle: int
    submit: wire.Submit
    tokens: list[int]
    produced: int = 0
    one_only: bool = False  # PREFILL: token #1 and no more


class Cluster:
    """What the fakes share: reservations waiting for their KV."""

    def __init__(self) -> None:
        self.reserved: dict[str, tuple[FakeWorker, Running]] = {}
        self.counter = itertools.count(1)


class Stream:
    """One router's stream on one fake."""

    def __init__(self) -> None:
        self.outbound: asyncio.Queue[wire.WorkerMessage | None] = asyncio.Queue()
        self.kv_sequence = 0

    def send(self, **kind: Any) -> None:
        self.outbound.put_nowait(wire.WorkerMessage(**kind))


@dataclass
class Script:
    """How a fake misbehaves. Consumed entries act once."""

    refuse: deque[common_pb2.Error] = field(default_factory=deque)  # answers of the next submissions
    refuse_always: common_pb2.Error | None = None
    die_after_tokens: int | None = None  # breaks all streams once a request has this many outputs of this fake
    fail_after_tokens: tuple[int, common_pb2.Error] | None = None
    silent: bool = False  # sends nothing any more, like a stopped process
    hold: bool = False  # makes no tokens, but reports load
    hold_tickets: bool = False  # reservations are answered by `give_tickets`
    hold_handoff: bool = False  # prefill: token #1 is told to the router, the KV never arrives


class FakeWorker(rpc.WorkerServicer):
    """`submits` and `aborts` are what the router sent, with the loop time of each abort."""

    def __init__(self, role: wire.Role, cluster: Cluster, *, worker_id: str = "", page_tokens: int = 16,
                 context_tokens: int = 512, tick_s: float = 0.002, function: TokenFunction = chained,
                 model_digest: str = "d0", host: str = "127.0.0.1", port: int = 0) -> None:  # fmt: skip
        self.role = role
        self.host = host
        self.cluster = cluster
        self.worker_id = worker_id or f"{wire.Role.Name(role).lower()}-{next(cluster.counter)}"
        self.compat = common_pb2.Compat(protocol_version=1, model_digest=model_digest, page_tokens=page_tokens)
        self.context_tokens = context_tokens
        self.tick_s = tick_s
        self.function = function
        self.script = Script()
        self.load = wire.Load(total_pages=1000, free_pages=1000, step_ms=5, prefill_tokens_per_s=10_000)
        self.cached_tokens = 0
        self.hash_root = b"r" * 16
        self.protocol_version = 1
        self.submits: list[wire.Submit] = []
        self.aborts: list[tuple[int, float, str]] = []
        self.sessions_ended: list[tuple[str, str]] = []
        """(tenant, session)"""
        self.snapshots_asked = 0
        self.messages = 0
        self.streams: list[Stream] = []
        self.running: list[Running] = []
        self.held_tickets: list[tuple[Stream, wire.Ticket]] = []
        self.address = ""
        self._port = port
        self._lives = itertools.count(1)
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    # ---- life

    async def start(self) -> FakeWorker:
        self.incarnation = f"{self.worker_id}.{next(self._lives)}"
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        rpc.add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"{self.host}:{self._port}")
        self.address = f"{self.host}:{self._port}"
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick_for_ever())
        return self

    async def stop(self) -> None:
        """Like kill -9: streams break, everything in flight is gone."""
        if self._ticker is not None:
            self._ticker.cancel()
        self.hang_up()
        if self._server is not None:
            await self._server.stop(0)
        self._server = None

    def hang_up(self) -> None:
        for stream in self.streams:
            stream.outbound.put_nowait(None)
        self.running.clear()
        for transfer, (worker, _) in list(self.cluster.reserved.items()):
            if worker is self:
                del self.cluster.reserved[transfer]

    # ---- the stream

    async def Connect(
        self, request_iterator: AsyncIterator[wire.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.WorkerMessage]:
        stream = Stream()
        first = await anext(request_iterator)
        assert first.WhichOneof("kind") == "hello"
        stream.send(hello=wire.WorkerHello(
            protocol_version=self.protocol_version, worker_id=self.worker_id, incarnation=self.incarnation,
            role=self.role, compat=self.compat, model_name="fake", context_tokens=self.context_tokens,
            hash_root=self.hash_root, peer_address="fake",
        ))  # fmt: skip
        self.send_kv(stream, snapshot=True)
        stream.send(load=self.load)
        self.streams.append(stream)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while (message := await stream.outbound.get()) is not None:
                self.messages += message.HasField("tokens")
                yield message
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the fake hung up")
        finally:
            reader.cancel()
            self.streams.remove(stream)
            self.running = [item for item in self.running if item.stream is not stream]

    async def _read(self, stream: Stream, messages: AsyncIterator[wire.RouterMessage]) -> None:
        async for message in messages:
            kind = message.WhichOneof("kind")
            if kind == "submit":
                self._submit(stream, message.submit)
            elif kind == "abort":
                loop_time = asyncio.get_running_loop().time()
                self.aborts.append((message.abort.handle, loop_time, message.abort.reason))
                self._drop(stream, message.abort.handle)
            elif kind == "session_end":
                self.sessions_ended.append((message.session_end.tenant, message.session_end.session))
            elif kind == "kv_snapshot":
                self.snapshots_asked += 1
                self.send_kv(stream, snapshot=True)

    def send_kv(self, stream: Stream, *, stored: bytes = b"", snapshot: bool = False, skip: int = 0) -> None:
        stream.kv_sequence += 1 + skip
        events = wire.KvEvents(sequence=stream.kv_sequence, snapshot=snapshot, stored=stored)
        stream.send(kv_events=events)

    def _drop(self, stream: Stream, handle: int) -> None:
        self.running = [item for item in self.running if (item.stream, item.handle) != (stream, handle)]
        for transfer, (worker, item) in list(self.cluster.reserved.items()):
            if worker is self and (item.stream, item.handle) == (stream, handle):
                del self.cluster.reserved[transfer]

    def _submit(self, stream: Stream, submit: wire.Submit) -> None:
        self.submits.append(submit)
        refusal = self.script.refuse.popleft() if self.script.refuse else self.script.refuse_always
        if refusal is not None:
            stream.send(failed=wire.Failed(handle=submit.handle, error=refusal))
            return
        item = Running(stream, submit.handle, submit, tokens_from_bytes(submit.tokens))
        if submit.mode == wire.SUBMIT_MODE_RESERVE:
            uncached = len(item.tokens) - self.cached_tokens
            if uncached < submit.local_below_tokens:
                stream.send(ticket=wire.Ticket(handle=item.handle, local=True, cached_tokens=self.cached_tokens))
                self.running.append(item)
                return
            transfer = f"{self.incarnation}-{next(self.cluster.counter)}"
            self.cluster.reserved[transfer] = (self, item)
            ticket = wire.Ticket(
                handle=item.handle, transfer_id=transfer, peer_address="fake", incarnation=self.incarnation,
                compat=self.compat,
            )  # fmt: skip
            self.held_tickets.append((stream, ticket))
            if not self.script.hold_tickets:
                self.give_tickets()
            return
        item.one_only = submit.mode == wire.SUBMIT_MODE_PREFILL
        self.running.append(item)

    def give_tickets(self) -> None:
        for stream, ticket in self.held_tickets:
            stream.send(ticket=ticket)
        self.held_tickets.clear()

    # ---- steps

    async def _tick_for_ever(self) -> None:
        for tick in itertools.count():
            await asyncio.sleep(self.tick_s)
            if self.script.silent:
                continue
            if tick % 20 == 0:
                self.load.steps = tick
                for stream in self.streams:
                    stream.send(load=self.load)
            if not self.script.hold:
                self._tick(tick)

    def _tick(self, step: int) -> None:
        by_stream: dict[int, tuple[Stream, wire.Tokens]] = {}
        for item in list(self.running):
            if item not in self.running:
                continue
            limit = self.script.fail_after_tokens
            if limit is not None and item.produced >= limit[0]:
                self.script.fail_after_tokens = None
                self.running.remove(item)
                item.stream.send(failed=wire.Failed(handle=item.handle, error=limit[1]))
                continue
            stream, message = by_stream.setdefault(id(item.stream), (item.stream, wire.Tokens(step=step)))
            self._produce(item, message)
        for stream, message in by_stream.values():
            stream.send(tokens=message)
        dies = self.script.die_after_tokens
        if dies is not None and any(item.produced >= dies for item in self.running):
            self.script.die_after_tokens = None
            self.hang_up()

    def _produce(self, item: Running, message: wire.Tokens) -> None:
        sampling, prompt = item.submit.sampling, item.submit.prompt_tokens
        token_id = self.function(item.tokens, prompt)
        entry, position = len(message.handles), len(item.tokens) - prompt
        message.handles.append(item.handle)
        message.positions.append(position)
        message.token_ids.append(token_id)
        if sampling.logprobs:
            top = range(token_id, token_id + sampling.top_logprobs)
            logprobs = common_pb2.TokenLogprobs(
                logprob=-0.5, top_ids=top, top_logprobs=[-0.5 - i for i in range(len(top))]
            )
            message.logprobs.append(wire.EntryLogprobs(entry=entry, logprobs=logprobs))
        if item.produced == 0:
            message.cached.append(wire.CachedTokens(entry=entry, cached_tokens=self.cached_tokens))
        item.tokens.append(token_id)
        item.produced += 1
        stop = token_id in sampling.stop_token_ids or (token_id == EOS_ID and not sampling.ignore_eos)
        if stop:
            message.finishes.append(wire.Finish(entry=entry, reason=wire.FINISH_REASON_STOP, stop_token_id=token_id))
        elif position + 1 >= sampling.max_tokens:
            message.finishes.append(wire.Finish(entry=entry, reason=wire.FINISH_REASON_LENGTH))
        elif not item.one_only:
            return
        else:
            self._hand_over(item, token_id)
        self.running.remove(item)

    def _hand_over(self, item: Running, token_id: int) -> None:
        if self.script.hold_handoff:
            return
        worker, waiting = self.cluster.reserved.pop(item.submit.ticket.transfer_id, (None, None))
        if worker is None or waiting is None:
            error = common_pb2.Error(kind=common_pb2.ERROR_KIND_TRANSFER, message="the receiver is gone")
            item.stream.send(failed=wire.Failed(handle=item.handle, error=error))
            return
        waiting.tokens.append(token_id)
        worker.running.append(waiting)


def fault(kind: str, message: str = "scripted", *, retry_after_ms: int = 0, param: str = "") -> common_pb2.Error:
    """An error record by the name of its kind."""
    number = common_pb2.ErrorKind.Value(f"ERROR_KIND_{kind.upper()}")
    return common_pb2.Error(kind=number, message=message, retry_after_ms=retry_after_ms, param=param)
