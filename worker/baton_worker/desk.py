"""Every open request of this worker, and which router it belongs to. Event loop only, never blocks.

Invariants: each request of each stream gets its Ticket, its Tokens and then at most one last word (a finish or Failed),
and nothing after it; the loss of a stream aborts everything that came through it; a draining worker takes nothing new,
but hands over what it has.
It does not know gRPC or threads: messages come from `server`, events through the outbox.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from baton_common.clock import Clock
from baton_common.errors import Aborted, BatonError, Draining
from baton_common.ids import PageHash, RequestId
from baton_engine.request import Request
from baton_proto import worker_pb2
from baton_worker import convert
from baton_worker.outbox import Ended, Event, KvChanged, KvMoved, Reserved, StepTokens
from baton_worker.ports import EnginePort, WorkerRole
from baton_worker.spans import RequestSpans
from baton_worker.storage import Storage
from baton_worker.stream import RouterStream

log = logging.getLogger("baton.worker")


class Taking(Enum):
    """What is taken from routers."""

    ALL = "all"
    DEPARTURES = "departures"  # drains: what moves a running request to another worker, no new work
    NOTHING = "nothing"


class ProtocolViolation(Exception):
    """The router broke the rules of the stream; the text says which."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One request that the engine has. Stays until Ended, also when the router is gone."""

    stream: RouterStream | None  # None: nobody listens any more
    handle: int
    request: Request  # the engine's, until Ended
    traceparent: str
    moves: list[KvMoved] = field(default_factory=list)
    told_last: bool = False  # the router has its finish


class Desk:
    """Takes what routers say to the engine and what the engine says to the routers."""

    def __init__(
        self,
        *,
        engine: EnginePort,
        role: WorkerRole,
        hello: worker_pb2.WorkerHello,
        clock: Clock,
        storage: Storage | None = None,
        spans: RequestSpans | None = None,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._spans = spans or RequestSpans()
        self._role = role
        self._hello = hello
        self._clock = clock
        self._entries: dict[RequestId, _Entry] = {}
        self._streams: dict[int, RouterStream] = {}
        self._cached: set[PageHash] = set()  # mirrors the prefix tree as far as it was told
        self.taking = Taking.ALL

    @property
    def open_requests(self) -> int:
        return len(self._entries)

    @property
    def streams(self) -> Sequence[RouterStream]:
        return tuple(self._streams.values())

    # ---- from routers -----------------------------------------------------------------------------------------------
    def join(self, stream: RouterStream) -> None:
        """A router said hello: answer with ours and with what is cached."""
        self._streams[stream.serial] = stream
        stream.send(worker_pb2.WorkerMessage(hello=self._hello))
        stream.send_kv(convert.kv_changes(tuple(self._cached), (), snapshot=True))

    def leave(self, stream: RouterStream) -> None:
        """The stream is gone: whatever it asked for is aborted, and told to nobody."""
        self._streams.pop(stream.serial, None)
        for request_id in stream.handles.values():
            self._entries[request_id].stream = None
            self._engine.abort(request_id, Aborted("the router's stream was lost", request_id=request_id))
        stream.handles.clear()

    def receive(self, stream: RouterStream, message: worker_pb2.RouterMessage) -> None:
        """One message after the hello. Raises ProtocolViolation."""
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self._submit(stream, message.submit)
        elif kind == "abort":
            self._abort(stream, message.abort)
        elif kind == "kv_snapshot":
            stream.send_kv(convert.kv_changes(tuple(self._cached), (), snapshot=True))
        elif kind == "session_end":
            if self._storage is not None:  # else nothing was kept
                self._storage.end_session(message.session_end.tenant, message.session_end.session)
        else:
            raise ProtocolViolation(f"unexpected message {kind or 'of an unknown kind'}")

    def _submit(self, stream: RouterStream, submit: worker_pb2.Submit) -> None:
        if submit.handle in stream.handles:
            raise ProtocolViolation(f"handle {submit.handle} is in use by {stream.handles[submit.handle]}")
        request_id = RequestId(f"{submit.request_id}/{stream.serial}.{submit.handle}")
        try:
            if self.taking is Taking.NOTHING or not (self.taking is Taking.ALL or self._role.hands_over(submit)):
                raise Draining("the worker is draining; use another one")
            request = convert.request_from(submit, request_id=request_id, now_s=self._clock.now())
            self._role.accept(submit, request)
        except BatonError as error:
            stream.send(convert.failed_message(submit.handle, error))
            return
        stream.handles[submit.handle] = request_id
        self._entries[request_id] = _Entry(
            stream=stream, handle=submit.handle, request=request, traceparent=submit.traceparent
        )
        self._engine.submit(request)

    def _abort(self, stream: RouterStream, abort: worker_pb2.Abort) -> None:
        request_id = stream.handles.get(abort.handle)
        if request_id is not None:  # else it crossed the request's end
            why = abort.reason or "the router asked for it"
            self._engine.abort(request_id, Aborted(why, request_id=request_id))

    # ---- from the shell ---------------------------------------------------------------------------------------------
    def abort_all(self, make_error: Callable[[RequestId], BatonError]) -> None:
        """Ask the engine to end everything; the answers come as Ended."""
        for request_id in self._entries:
            self._engine.abort(request_id, make_error(request_id))

    def fail_all(self, error: BatonError) -> None:
        """The engine is dead: tell every router at once, and forget."""
        for request_id in tuple(self._entries):
            self._ended(Ended(request_id=request_id, error=error))

    # ---- from the engine --------------------------------------------------------------------------------------------
    def deliver(self, events: Sequence[Event]) -> None:
        """What the outbox collected, in order."""
        for event in events:
            match event:
                case StepTokens():
                    self._tokens(event)
                case Reserved():
                    self._reserved(event)
                case Ended():
                    self._ended(event)
                case KvChanged():
                    self._kv_changed(event)
                case KvMoved():
                    self._kv_moved(event)

    def _tokens(self, event: StepTokens) -> None:
        by_stream: dict[int, tuple[RouterStream, list[convert.HandleToken]]] = {}
        for token in event.tokens:
            entry = self._entries.get(token.request_id)
            if entry is None or entry.stream is None or entry.told_last:
                continue
            by_stream.setdefault(entry.stream.serial, (entry.stream, []))[1].append((entry.handle, token))
            entry.told_last = token.finish is not None
        for stream, entries in by_stream.values():
            stream.send(convert.tokens_message(event.step, entries))

    def _reserved(self, event: Reserved) -> None:
        entry = self._entries.get(event.request_id)
        if entry is None or entry.stream is None:
            return
        ticket = worker_pb2.Ticket(
            handle=entry.handle,
            transfer_id=event.transfer_id or "",
            peer_address=self._hello.peer_address,
            incarnation=self._hello.incarnation,
            first_missing_token=event.first_missing_token,
            cached_tokens=event.cached_tokens,
            local=event.local,
            compat=self._hello.compat,
        )
        entry.stream.send(worker_pb2.WorkerMessage(ticket=ticket))

    def _ended(self, event: Ended) -> None:
        entry = self._entries.pop(event.request_id, None)
        if entry is None:
            return
        if entry.stream is not None:
            entry.stream.handles.pop(entry.handle, None)
            if event.error is not None and not entry.told_last:
                entry.stream.send(convert.failed_message(entry.handle, event.error))
        self._spans.tell(entry.request, parent=entry.traceparent, moves=entry.moves, error=event.error)

    def _kv_moved(self, event: KvMoved) -> None:
        entry = self._entries.get(event.request_id)
        if entry is not None:
            entry.moves.append(event)

    def _kv_changed(self, event: KvChanged) -> None:
        self._cached.update(event.stored)
        self._cached.difference_update(event.removed)
        changes = convert.kv_changes(event.stored, event.removed)
        for stream in self._streams.values():
            stream.send_kv(changes)
