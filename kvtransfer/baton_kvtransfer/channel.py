"""Framed protobuf messages over one connected stream socket; the control path of every wire.

Frame: u32 message bytes, u32 payload bytes, u64 digest of the message seeded with the payload length, message, payload.
Owned by one thread. Reading never blocks; writing blocks at most `stall_s` without progress. Messages that are queued
leave together in one write. Whatever a peer sends, sizes are bounded before memory is touched, and the answer to
nonsense is WireError.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import xxhash
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from baton_kvtransfer.errors import PeerGone, WireError
from baton_proto.peer_pb2 import PeerMessage

MAX_MESSAGE_BYTES = 1 << 18
_PREFIX = struct.Struct("<IIQ")
_BUFFER_BYTES = MAX_MESSAGE_BYTES + _PREFIX.size
_READ_BYTES = 4096
"""At once: many messages, but little of a payload, which is read to where it belongs."""
_FDS_AT_ONCE = 4

Land = Callable[[PeerMessage, int], memoryview | None]
"""Where a payload of that many bytes goes; None = read and forget. May raise WireError."""


class Channel(Protocol):
    """Duplex, ordered. `carries_fds`: both ends are on one host and descriptors can travel."""

    @property
    def carries_fds(self) -> bool: ...

    def fileno(self) -> int: ...

    def queue(self, message: PeerMessage) -> None:
        """Behind all that was said; leaves with the next `send` or `flush`. Raises WireError when it is too long."""

    def flush(self) -> None:
        """Blocks until the operating system has all that was queued. Raises PeerGone."""

    def send(self, message: PeerMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        """Queue and flush; the payload may be reused then. Raises PeerGone."""

    def receive(self, land: Land) -> PeerMessage | None:
        """The next whole message (with its payload landed). Raises PeerGone, WireError.

        None: not yet. Then look again when the descriptor is readable; nothing whole is left inside.
        """

    def take_fds(self) -> list[int]:
        """Descriptors that arrived so far; the caller owns them."""

    def close(self) -> None: ...


def _check(message: bytes | memoryview, payload_bytes: int) -> int:
    return xxhash.xxh3_64_intdigest(message, payload_bytes)


def _frame(message: PeerMessage, payload_bytes: int) -> bytes:
    body: bytes = message.SerializeToString()
    if len(body) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(body)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    prefix = _PREFIX.pack(len(body), payload_bytes, _check(body, payload_bytes))
    return prefix + body


class SocketChannel:
    def __init__(self, sock: socket.socket, *, max_payload_bytes: int, stall_s: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._max_payload_bytes = max_payload_bytes
        self._stall_s = stall_s
        self.carries_fds = sock.family == socket.AF_UNIX
        self._fds: list[int] = []
        self._queued = bytearray()  # frames to be written
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0  # unread bytes of the buffer
        self._dry = False  # the last read took all there was
        self._message: PeerMessage | None = None  # parsed, its payload is still coming
        self._left = 0  # payload bytes to come
        self._target: memoryview | None = None  # where they go

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)

    def take_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    # ---- writing ------------------------------------------------------------------------------------------------
    def queue(self, message: PeerMessage) -> None:
        self._queued += _frame(message, 0)

    def flush(self) -> None:
        if self._queued:
            parts = [memoryview(self._queued)]
            self._queued = bytearray()
            self._write(parts, ())

    def send(self, message: PeerMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        if fds:
            self.flush()  # descriptors travel with the first byte of their message
        self._queued += _frame(message, 0 if payload is None else payload.nbytes)
        parts = [memoryview(self._queued)]
        self._queued = bytearray()
        if payload is not None:
            parts.append(payload)
        self._write(parts, fds)

    def _write(self, parts: list[memoryview], fds: Sequence[int]) -> None:
        try:
            while parts:
                try:
                    sent = socket.send_fds(self._sock, parts[:1], list(fds)) if fds else self._sock.sendmsg(parts)
                except BlockingIOError:
                    self._wait_writable()
                    continue
                fds = ()
                while parts and sent >= parts[0].nbytes:
                    sent -= parts.pop(0).nbytes
                if parts:
                    parts[0] = parts[0][sent:]
        except OSError as error:
            raise PeerGone(f"connection lost: {error.strerror}", phase="send") from error

    def _wait_writable(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        if not poll.poll(self._stall_s * 1e3):
            raise PeerGone(f"the peer took nothing for {self._stall_s:.1f} s", phase="send")

    # ---- reading ------------------------------------------------------------------------------------------------
    def receive(self, land: Land) -> PeerMessage | None:
        if self._message is None:
            message = self._parse()
            if message is None and not self._dry and self._fill():
                message = self._parse()
            if message is None:
                self._dry = False
                return None
            self._message = message
            self._target = land(message, self._left) if self._left else None
        if self._left and not self._read_payload():
            self._dry = False
            return None
        message, self._message, self._target = self._message, None, None
        return message

    def _parse(self) -> PeerMessage | None:
        if self._end - self._begin < _PREFIX.size:
            return None
        size, payload_bytes, check = _PREFIX.unpack_from(self._buffer, self._begin)
        if size > MAX_MESSAGE_BYTES or payload_bytes > self._max_payload_bytes:
            raise WireError(f"frame of {size} + {payload_bytes} bytes exceeds the limits; not a Baton peer?")
        begin = self._begin + _PREFIX.size
        if self._end - begin < size:
            return None
        body = self._view[begin : begin + size]
        if _check(body, payload_bytes) != check:
            raise WireError("damaged frame: its digest does not match")
        message = PeerMessage()
        try:
            message.ParseFromString(bytes(body))
        except DecodeError:
            raise WireError("frame is no PeerMessage") from None
        self._begin = begin + size
        self._left = payload_bytes
        return message

    def _fill(self) -> bool:
        """Read what is there; True when something was."""
        if self._begin:
            rest = self._end - self._begin
            self._buffer[:rest] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, rest
        room = self._view[self._end : self._end + _READ_BYTES]
        count = self._recv(room)
        self._end += count
        self._dry = count < room.nbytes
        return count > 0

    def _recv(self, view: memoryview) -> int:
        """0 = nothing there now. Raises PeerGone at the end of the stream."""
        try:
            if self.carries_fds:
                count, ancillary, _, _ = self._sock.recvmsg_into([view], socket.CMSG_SPACE(4 * _FDS_AT_ONCE))
                self._keep_fds(ancillary)
            else:
                count = self._sock.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerGone(f"connection lost: {error.strerror}", phase="receive") from error
        if count == 0:
            raise PeerGone("the peer closed the connection", phase="receive")
        return count

    def _keep_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
        if len(self._fds) > _FDS_AT_ONCE:
            raise WireError("the peer sent descriptors that nobody asked for")

    def _read_payload(self) -> bool:
        """Move payload to its target; True when it is complete."""
        while self._left:
            target = self._target[-self._left :] if self._target is not None else None
            buffered = min(self._left, self._end - self._begin)
            if buffered:
                if target is not None:
                    target[:buffered] = self._view[self._begin : self._begin + buffered]
                self._begin += buffered
                self._left -= buffered
                continue
            self._begin = self._end = 0
            if self._dry:
                return False
            room = target if target is not None else self._view[: min(self._left, _BUFFER_BYTES)]
            count = self._recv(room)
            self._left -= count
            self._dry = count < room.nbytes
        return True
