"""The thread of one link: waits for its channel and for commands, keeps time, and ends in exactly one way.

`OutLink` (we send KV) and `InLink` (we receive it) fill in the steps. Only this thread touches the channel and the
protocol half; everybody else posts commands. Silence of three heartbeats, a broken connection, a broken rule and `stop`
all lead to the same end: fence, fail what is left, tell the endpoint.
"""

from __future__ import annotations

import logging
import select
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton_common.clock import Clock
from baton_common.errors import ErrorKind
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.errors import Aborted, KVTransferError, PeerGone, WireError
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.metrics import LinkMetrics, TransferMetrics
from baton_kvtransfer.protocol import Timers
from baton_kvtransfer.records import Direction, PeerInfo, PeerState
from baton_kvtransfer.transport import Transport
from baton_kvtransfer.waker import Waker
from baton_proto.common_pb2 import Compat
from baton_proto.peer_pb2 import PeerMessage

log = logging.getLogger(__name__)

MESSAGES_AT_ONCE = 64
"""Read between two looks at the clock and at commands."""
WORK_AT_ONCE = 4
"""Pieces of work between two looks at the channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What every link of one endpoint needs to know about its own side."""

    worker_id: str
    incarnation: str
    compat: Compat
    layout: PageLayout
    blocks: Blocks
    config: TransferConfig
    clock: Clock
    metrics: TransferMetrics
    transport: Transport

    @property
    def timers(self) -> Timers:
        return Timers.of(self.config)


class Link(ABC):
    """`ended` is called once, on the link's thread, when everything of the link is over."""

    def __init__(self, *, name: str, local: Local, direction: Direction, ended: Callable[[Link], None]) -> None:
        self._local = local
        self._direction = direction
        self._peer_id = self._peer_incarnation = self._address = self._wire = self._reason = ""
        self._state: PeerState = "connecting"
        self._bytes = 0
        self._counters: LinkMetrics | None = None  # while the link is up
        self._ended = ended
        self._lock = threading.Lock()
        self._commands: deque[Callable[[], None]] = deque()
        self._closed = False
        self._stop = False
        self._waker = Waker()
        self._heard_s = 0.0
        self._tick_s = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the link soon; what is in flight fails with Aborted."""
        self._stop = True
        self._waker.wake()

    def join(self, timeout_s: float) -> bool:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def info(self) -> PeerInfo:
        """Snapshot, from any thread."""
        return PeerInfo(
            worker_id=self._peer_id,
            incarnation=self._peer_incarnation,
            direction=self._direction,
            address=self._address,
            state=self._state,
            wire=self._wire,
            reason=self._reason,
            bytes=self._bytes,
            transfers=self._in_flight(),
        )

    def post(self, command: Callable[[], None]) -> bool:
        """From any thread. False: the link is over, the command will not run."""
        with self._lock:
            if self._closed:
                return False
            self._commands.append(command)
        self._waker.wake()
        return True

    # ---- the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        error: KVTransferError
        try:
            self._serve()
            error = Aborted("this endpoint was closed", kind=ErrorKind.DRAINING)
        except KVTransferError as failure:
            error = failure
        except OSError as failure:
            error = PeerGone(f"connection lost: {failure.strerror or failure}")
        except Exception as failure:  # a defect of ours must not leave requests without an answer
            log.exception("link failed", extra={"peer": self._peer_id})
            error = WireError(f"defect in the link: {failure!r}")
        error.peer = error.peer or self._peer_id or self._address
        with self._lock:
            self._closed = True
        for command in self._commands:
            command()
        self._tell_end(error)
        if self._counters is not None:
            self._counters.close()
        self._lose(error)
        self._waker.close()
        self._ended(self)

    def _count_as_up(self) -> None:
        self._counters = LinkMetrics(
            self._local.metrics,
            direction=self._direction,
            peer=self._peer_id,
            wire=self._wire,
            now_s=self._local.clock.now(),
        )

    def _tell_end(self, error: KVTransferError) -> None:
        was_up = self._state == "up"
        if self._state != "refused":
            self._state = "gone"
        self._reason = error.message
        fields = {"peer": error.peer, "direction": self._direction, "error": type(error).__name__}
        if self._stop:
            log.debug("link closed: %s", error.message, extra=fields)
            return
        self._local.metrics.fences.inc(was_up)
        level = logging.WARNING if self._in_flight() or not was_up else logging.INFO
        log.log(level, "link %s: %s", self._state, error.message, extra=fields)

    def _loop(self, channel: Channel) -> None:
        """Until stopped; raises what ends the link."""
        timers, clock = self._local.timers, self._local.clock
        poll, waker = self._poll(channel), self._waker.fileno()
        self._heard_s = clock.now()
        busy, unread = False, True  # the handshake may have read more than its own message
        while not self._stop:
            wait_s = 0.0 if busy or unread else self._tick_s - clock.now()
            for fileno, _ in poll.poll(max(0.0, wait_s * 1e3)):
                if fileno == waker:
                    self._waker.clear()
                else:
                    unread = True
            ran = self._run_commands()
            if unread:
                unread = self._read(channel)
            now_s = clock.now()
            if ran or self._in_flight():  # a deadline may have come nearer
                self._tick_s = min(self._tick_s, now_s + timers.tick_s)
            if now_s - self._heard_s >= timers.lease_s:
                raise PeerGone(f"silent for {now_s - self._heard_s:.1f} s", phase="alive")
            if now_s >= self._tick_s:
                self._tick(now_s)
                if self._counters is not None:
                    self._counters.tick(now_s)
                self._tick_s = now_s + (timers.tick_s if self._in_flight() else timers.alive_s)
            for _ in range(WORK_AT_ONCE):
                busy = self._work(channel)
                self._flush(channel)
                if not busy or clock.now() >= self._tick_s:
                    break

    def _read(self, channel: Channel) -> bool:
        """What the channel has; True when there may be more."""
        for _ in range(MESSAGES_AT_ONCE):
            if not self._read_one(channel):
                return False
            self._heard_s = self._local.clock.now()
        return True

    def _poll(self, channel: Channel) -> select.poll:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        poll.register(self._waker.fileno(), select.POLLIN)
        return poll

    def _run_commands(self) -> bool:
        """True when there was one."""
        ran = bool(self._commands)
        while self._commands:
            self._commands.popleft()()
        return ran

    def _await(self, channel: Channel, deadline_s: float) -> PeerMessage:
        """One message of the handshake."""
        clock = self._local.clock
        poll = self._poll(channel)
        while not self._stop:
            message = channel.receive(lambda _message, _size: None)
            if message is not None:
                return message
            left_s = deadline_s - clock.now()
            if left_s <= 0:
                raise PeerGone("no answer to the hello in time", phase="hello")
            poll.poll(left_s * 1e3)
            self._waker.clear()  # commands wait in their queue until the link is up
        raise Aborted("this endpoint was closed", kind=ErrorKind.DRAINING)

    # ---- steps of the subclass ----------------------------------------------------------------------------------
    @abstractmethod
    def _serve(self) -> None:
        """Handshake, then `_loop`; closes its channel on the way out."""

    @abstractmethod
    def _read_one(self, channel: Channel) -> bool:
        """Handle one message; False when none is there."""

    @abstractmethod
    def _work(self, channel: Channel) -> bool:
        """Something else to do? True = come back at once."""

    @abstractmethod
    def _tick(self, now_s: float) -> None: ...

    @abstractmethod
    def _flush(self, channel: Channel) -> None:
        """Send messages in one write, deliver results."""

    @abstractmethod
    def _in_flight(self) -> int: ...

    @abstractmethod
    def _lose(self, error: KVTransferError) -> None:
        """The link is over: fence, fail what is left."""
