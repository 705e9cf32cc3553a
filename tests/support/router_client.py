"""A router reduced to its stream: says hello, submits, keeps what comes back per handle. For tests of workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import grpc

from baton_common.errors import BatonError
from baton_common.hashing import token_bytes
from baton_engine.request import Mode, SamplingParams
from baton_engine.role import TokenOut
from baton_proto import worker_pb2, worker_pb2_grpc
from baton_worker.convert import PROTOCOL_VERSION, error_from, sampling_message, tokens_from

MODES = {
    Mode.LOCAL: worker_pb2.SUBMIT_MODE_LOCAL,
    Mode.PREFILL: worker_pb2.SUBMIT_MODE_PREFILL,
    Mode.RESERVE: worker_pb2.SUBMIT_MODE_RESERVE,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@dataclass
class Answer:
    """Everything that came back for one handle, in order of arrival."""

    handle: int
    ticket: asyncio.Future[worker_pb2.Ticket]
    over: asyncio.Future[None]
    tokens: list[TokenOut] = field(default_factory=list)
    error: BatonError | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    async def first(self) -> TokenOut:
        """The first token; raises the error that came instead."""
        while not self.tokens:
            self._raise()
            self.arrived.clear()
            await self.arrived.wait()
        return self.tokens[0]

    async def end(self) -> list[int]:
        """All token ids, once the last word came; raises the error that it was."""
        await self.over
        self._raise()
        return self.token_ids

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


class RouterClient:
    """`async with RouterClient("host:port") as router`. Use inside one event loop."""

    def __init__(self, address: str, *, router_id: str = "test-router") -> None:
        self.hello: worker_pb2.WorkerHello | None = None
        self.loads: list[worker_pb2.Load] = []
        self.kv_events: list[worker_pb2.KvEvents] = []
        self.batches: list[worker_pb2.Tokens] = []
        self.late: list[int] = []  # handles that got a message after their last word
        self._router_id = router_id
        self._channel = grpc.aio.insecure_channel(address, options=(("grpc.max_receive_message_length", 64 << 20),))
        self._call: grpc.aio.StreamStreamCall | None = None
        self._answers: dict[int, Answer] = {}
        self._reader: asyncio.Task[None] | None = None
        self._next = 1
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> RouterClient:
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Connect()
        try:  # a worker that refuses may end the call before our first write, or before our first read
            await self.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id))
            first = await self._call.read()
        except grpc.aio.AioRpcError as error:
            await self._channel.close()
            raise ConnectionError(f"{error.code()}: {error.details()}") from None
        assert first.WhichOneof("kind") == "hello", first
        self.hello = first.hello
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """The stream is lost, as when the router dies."""
        if self._reader is not None:
            self._reader.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()

    async def send(self, **message: object) -> None:
        assert self._call is not None
        async with self._writing:  # gRPC takes one write at a time
            await self._call.write(worker_pb2.RouterMessage(**message))

    async def submit(
        self,
        mode: Mode,
        tokens: Sequence[int],
        *,
        sampling: SamplingParams = GREEDY,
        prompt_tokens: int | None = None,
        ticket: worker_pb2.Ticket | None = None,
        deadline_s: float = 60.0,
        local_below_tokens: int = 0,
        keep: worker_pb2.KvKeep | None = None,
        raw: Mapping[str, object] | None = None,
    ) -> Answer:
        """Returns at once; await `ticket`, `first()` or `end()` of the answer. `raw` overwrites fields of Submit."""
        loop = asyncio.get_running_loop()
        handle, self._next = self._next, self._next + 1
        answer = self._answers[handle] = Answer(handle, loop.create_future(), loop.create_future())
        submit = worker_pb2.Submit(
            handle=handle,
            request_id=f"req-{handle}",
            mode=MODES[mode],
            tokens=token_bytes(tokens),
            prompt_tokens=len(tokens) if prompt_tokens is None else prompt_tokens,
            sampling=sampling_message(sampling),
            deadline_ms=round(deadline_s * 1000),
            ticket=ticket,
            local_below_tokens=local_below_tokens,
            keep=keep,
        )
        for name, value in (raw or {}).items():
            setattr(submit, name, value)
        await self.send(submit=submit)
        return answer

    async def end_session(self, session: str, tenant: str = "") -> None:
        await self.send(session_end=worker_pb2.SessionEnd(session=session, tenant=tenant))

    async def abort(self, answer: Answer, reason: str = "") -> None:
        await self.send(abort=worker_pb2.Abort(handle=answer.handle, reason=reason))

    async def code(self) -> grpc.StatusCode:
        """How the stream ended; waits for the end."""
        assert self._call is not None
        return await self._call.code()

    async def wait(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """Until something that came over this stream makes `condition` true."""
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def _read(self) -> None:
        assert self._call is not None
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
            raise ConnectionError(f"{await self._call.code()}: {await self._call.details()}")
        except grpc.aio.AioRpcError as error:
            self._lost(ConnectionError(f"{error.code()}: {error.details()}"))
        except ConnectionError as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        for answer in self._answers.values():
            for future in (answer.ticket, answer.over):
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # nobody has to wait for it

    def _take(self, message: worker_pb2.WorkerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "tokens":
            self.batches.append(message.tokens)
            for handle, token in tokens_from(message.tokens):
                self._token(handle, token)
        elif kind == "failed":
            self._end(message.failed.handle, error_from(message.failed.error))
        elif kind == "ticket":
            self._answers[message.ticket.handle].ticket.set_result(message.ticket)
        elif kind == "load":
            self.loads.append(message.load)
        elif kind == "kv_events":
            self.kv_events.append(message.kv_events)

    def _token(self, handle: int, token: TokenOut) -> None:
        answer = self._answers[handle]
        if answer.over.done():
            self.late.append(handle)
        answer.tokens.append(token)
        answer.arrived.set()
        if token.finish is not None:
            self._end(handle, None)

    def _end(self, handle: int, error: BatonError | None) -> None:
        answer = self._answers[handle]
        if answer.over.done():
            self.late.append(handle)
            return
        answer.error = error
        answer.over.set_result(None)
        answer.arrived.set()
        if error is not None and not answer.ticket.done():
            answer.ticket.set_exception(error)
            answer.ticket.exception()
