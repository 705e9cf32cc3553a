"""Shared memory: the receiver makes one memfd per peer, the sender maps it and gathers straight into the slots.

The descriptor travels over the unix socket. The file is sealed against resizing, so neither side can make the other
fault. Fence = drop the mapping: a late write of the old peer then hits memory that nobody reads, for ever, because a
region is never used for a second link.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence

from baton_kvtransfer.channel import Channel
from baton_kvtransfer.errors import WireError
from baton_kvtransfer.wires import Caps
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ShmWire:
    name = "shm"
    caps = Caps(same_host=True, remote_memory=True, detects_death=True)

    def land(self, *, slots: int, slot_bytes: int) -> ShmLanding:
        try:
            fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, slots * slot_bytes)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                memory = mmap.mmap(fd, slots * slot_bytes)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise WireError(f"no shared memory for {slots} slots of {slot_bytes} bytes: {error.strerror}") from error
        return ShmLanding(fd, memory, slot_bytes)

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> ShmReach:
        fds = channel.take_fds()
        try:
            if len(fds) != 1:
                raise WireError(f"expected one descriptor with the welcome, got {len(fds)}")
            size = len(welcome.slots) * welcome.slot_bytes
            sealed = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or os.fstat(fds[0]).st_size < size:
                raise WireError("the peer's slots are no sealed memory of the announced size")
            return ShmReach(mmap.mmap(fds[0], size), welcome.slot_bytes)
        except OSError as error:
            raise WireError(f"cannot map the peer's slots: {error.strerror}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def start(self) -> None:
        """Needs nothing."""

    def close(self) -> None:
        """Holds nothing."""


class ShmLanding:
    region = b""

    def __init__(self, fd: int, memory: mmap.mmap, slot_bytes: int) -> None:
        self.fds: Sequence[int] = (fd,)
        self._view = memoryview(memory)
        self._slot_bytes = slot_bytes

    def slot(self, index: int, size: int) -> memoryview:
        begin = index * self._slot_bytes
        return self._view[begin : begin + size]

    def fence(self) -> None:
        self._view = memoryview(b"")  # the mapping goes with its last view
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


class ShmReach:
    def __init__(self, memory: mmap.mmap, slot_bytes: int) -> None:
        self._view = memoryview(memory)
        self._slot_bytes = slot_bytes

    def window(self, slot: Slot, size: int) -> memoryview:
        begin = slot.index * self._slot_bytes
        return self._view[begin : begin + size]

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        channel.queue(message)
        return True

    def settled(self, channel: Channel) -> Sequence[int]:
        return ()

    def fence(self) -> None:
        self._view = memoryview(b"")
