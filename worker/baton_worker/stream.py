"""One router's stream: its open handles and its bounded queue of outgoing messages. Event loop only.

A router that does not read must not cost memory without end: KV events are left out first (the gap in their sequence
makes the router ask for a snapshot), then the stream breaks and the server closes it.
It does not know gRPC, the engine, or other streams.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from baton_common.clock import Clock
from baton_common.ids import RequestId
from baton_proto import worker_pb2
from baton_worker.convert import KvChange

Write = Callable[[worker_pb2.WorkerMessage], Awaitable[None]]


class RouterStream:
    """`serial` is unique in this process: two routers may use the same handles and request ids."""

    def __init__(self, *, serial: int, router_id: str, backlog: int, stall_s: float, clock: Clock) -> None:
        self.serial = serial
        self.router_id = router_id
        self.handles: dict[int, RequestId] = {}
        self._backlog = backlog
        self._stall_s = stall_s
        self._clock = clock
        self._queue: deque[worker_pb2.WorkerMessage] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._broken = asyncio.Event()
        self._why = ""
        self._writing_since_s: float | None = None
        self._kv_sequence = 0

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """Queue one message; after a break nothing is queued."""
        if self._broken.is_set():
            return
        if len(self._queue) >= self._backlog:
            self.break_off(f"router {self.router_id} left {self._backlog} messages unread")
            return
        self._queue.append(message)
        self._emptied.clear()
        self._filled.set()

    def send_kv(self, changes: Sequence[KvChange]) -> None:
        """KV events in order. With half the backlog full they are skipped, and their numbers with them."""
        for change in changes:
            self._kv_sequence += 1
            if len(self._queue) < self._backlog // 2:
                events = worker_pb2.KvEvents(
                    sequence=self._kv_sequence, snapshot=change.snapshot, stored=change.stored, removed=change.removed
                )
                self.send(worker_pb2.WorkerMessage(kv_events=events))

    def send_load(self, load: worker_pb2.Load) -> None:
        """Only when nothing waits: an old load says nothing. Also looks for a stuck write, as it comes regularly."""
        if not self._queue:
            self.send(worker_pb2.WorkerMessage(load=load))
        since_s = self._writing_since_s
        if since_s is not None and self._clock.now() - since_s > self._stall_s:
            self.break_off(f"router {self.router_id} has read nothing for {self._stall_s:g} s")

    def break_off(self, why: str) -> None:
        """Ends the stream: `broken` returns, what is queued is dropped."""
        self._why = self._why or why
        self._broken.set()
        self._queue.clear()
        self._emptied.set()

    async def broken(self) -> str:
        """Wait for a break and say why."""
        await self._broken.wait()
        return self._why

    async def flushed(self) -> None:
        """Return when everything queued so far has been written, or the stream broke."""
        await self._emptied.wait()

    async def pump(self, write: Write) -> None:
        """Write messages as they come, until cancelled."""
        while True:
            await self._filled.wait()
            while self._queue:
                self._writing_since_s = self._clock.now()
                await write(self._queue.popleft())
            self._writing_since_s = None
            self._filled.clear()
            self._emptied.set()
