"""Payload in the stream, right behind its header; the receiver reads it into its own memory. Between any two hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton_kvtransfer.channel import Channel
from baton_kvtransfer.wires import Caps
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot


class TcpWire:
    name = "tcp"
    caps = Caps(same_host=False, remote_memory=False, detects_death=True)

    def land(self, *, slots: int, slot_bytes: int) -> TcpLanding:
        return TcpLanding(slot_bytes)

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> TcpReach:
        return TcpReach(welcome.slot_bytes)

    def start(self) -> None:
        """Needs nothing."""

    def close(self) -> None:
        """Holds nothing."""


class TcpLanding:
    """One buffer serves all slots: a payload is verified and scattered before the next byte is read."""

    region = b""
    fds: Sequence[int] = ()

    def __init__(self, slot_bytes: int) -> None:
        self._view = memoryview(bytearray(slot_bytes))

    def slot(self, index: int, size: int) -> memoryview:
        return self._view[:size]

    def fence(self) -> None:
        """Nobody else can write here."""


class TcpReach:
    """One staging buffer: the kernel has copied it when a push returns."""

    def __init__(self, slot_bytes: int) -> None:
        self._view = memoryview(bytearray(slot_bytes))

    def window(self, slot: Slot, size: int) -> memoryview:
        return self._view[:size]

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        channel.send(message, window)
        return True

    def settled(self, channel: Channel) -> Sequence[int]:
        return ()

    def fence(self) -> None:
        """Holds nothing of the peer."""
