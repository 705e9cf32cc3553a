"""Sender and receiver in one process: slots are plain memory, handed over by reference. For embedding and for tests.

Channels are socket pairs, so the threads and the protocol are those of the real wires.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from baton_kvtransfer.channel import Channel, SocketChannel
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.errors import PeerGone, WireError
from baton_kvtransfer.protocol import ALIVE_MISSES
from baton_kvtransfer.transport import Dialed
from baton_kvtransfer.waker import Waker
from baton_kvtransfer.wires import Caps, Wire
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot


class Hub:
    """Where the endpoints of one process find each other; make one and give it to all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.listeners: dict[str, InprocListener] = {}
        self.regions: dict[bytes, bytearray] = {}

    def address(self) -> str:
        with self._lock:
            return f"inproc://{next(self._numbers)}"

    def deposit(self, memory: bytearray) -> bytes:
        """Returns the one-time key for `collect`."""
        key = secrets.token_bytes(8)
        self.regions[key] = memory
        return key


class InprocWire:
    name = "inproc"
    caps = Caps(same_host=True, remote_memory=True, detects_death=True)

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def land(self, *, slots: int, slot_bytes: int) -> InprocMemory:
        memory = bytearray(slots * slot_bytes)
        return InprocMemory(memory, slot_bytes, self._hub.deposit(memory))

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> InprocMemory:
        memory = self._hub.regions.pop(welcome.region, None)
        if memory is None:
            raise WireError("the peer's slots are not in this process")
        return InprocMemory(memory, welcome.slot_bytes, b"")

    def start(self) -> None:
        """Needs nothing."""

    def close(self) -> None:
        """Holds nothing."""


class InprocMemory:
    """Both ends look alike: a view of the same slots."""

    fds: Sequence[int] = ()

    def __init__(self, memory: bytearray, slot_bytes: int, region: bytes) -> None:
        self._view = memoryview(memory)
        self._slot_bytes = slot_bytes
        self.region = region

    def slot(self, index: int, size: int) -> memoryview:
        begin = index * self._slot_bytes
        return self._view[begin : begin + size]

    def window(self, slot: Slot, size: int) -> memoryview:
        return self.slot(slot.index, size)

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        channel.queue(message)
        return True

    def settled(self, channel: Channel) -> Sequence[int]:
        return ()

    def fence(self) -> None:
        self._view = memoryview(b"")


class InprocTransport:
    def __init__(self, config: TransferConfig, hub: Hub) -> None:
        self._config = config
        self._hub = hub
        self.wires: Mapping[str, Wire] = {"inproc": InprocWire(hub)}

    def listen(self) -> InprocListener:
        address = self._hub.address()
        listener = self._hub.listeners[address] = InprocListener(address, self._hub)
        return listener

    def dial(self, address: str) -> Dialed:
        listener = self._hub.listeners.get(address)
        if listener is None:
            raise PeerGone(f"nobody listens at {address}", peer=address, phase="connect")
        ours, theirs = (self._channel(sock) for sock in socket.socketpair())
        listener.offer(theirs)
        return Dialed(channel=ours, wires=("inproc",), reason="same process")

    def close(self) -> None:
        """Sockets end with their channels."""

    def _channel(self, sock: socket.socket) -> SocketChannel:
        stall_s = self._config.alive_interval_s * ALIVE_MISSES
        return SocketChannel(sock, max_payload_bytes=self._config.slot_bytes, stall_s=stall_s)


class InprocListener:
    def __init__(self, address: str, hub: Hub) -> None:
        self.address = address
        self._hub = hub
        self._waker = Waker()
        self._offered: deque[Channel] = deque()

    def offer(self, channel: Channel) -> None:
        self._offered.append(channel)
        self._waker.wake()

    def filenos(self) -> Sequence[int]:
        return [self._waker.fileno()]

    def accept(self) -> list[Channel]:
        self._waker.clear()
        channels: list[Channel] = []
        while self._offered:
            channels.append(self._offered.popleft())
        return channels

    def close(self) -> None:
        self._hub.listeners.pop(self.address, None)
        for channel in self.accept():
            channel.close()
        self._waker.close()
