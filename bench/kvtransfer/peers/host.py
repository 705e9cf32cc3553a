"""What the operating system can do: one thread's memmove, one TCP socket, writes into another process (UCX: cma).

No Python runs per page: vectors are built once, the calls take a thousand at a time.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.kvtransfer.contenders import Contender
from bench.kvtransfer.peers.memory import Addresses, Pool
from bench.kvtransfer.remote import Remote, RemoteFailed
from bench.kvtransfer.shapes import Shape

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.process_vm_writev.restype = ctypes.c_ssize_t
_LIBC.process_vm_writev.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip
for _call in (_LIBC.sendmsg, _LIBC.recvmsg):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_VECTORS_AT_ONCE = 1024
_BUFFER_BYTES = 4 << 20
_VECTOR_BYTES = 16


class _MessageHeader(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def stream(fd: int, vectors: Addresses, *, send: bool) -> None:
    """All of it through a socket, from or to the pages."""
    call = _LIBC.sendmsg if send else _LIBC.recvmsg
    left, at = vectors.copy(), 0
    header = _MessageHeader()
    while at < len(left):
        header.vectors = left.ctypes.data + _VECTOR_BYTES * at
        header.vector_count = min(_VECTORS_AT_ONCE, len(left) - at)
        moved = call(fd, ctypes.addressof(header), 0)
        if moved <= 0:
            raise OSError(ctypes.get_errno(), "the socket ended")
        ends = np.cumsum(left[at : at + header.vector_count, 1])
        whole = int(np.searchsorted(ends, moved, side="right"))
        rest = moved - (int(ends[whole - 1]) if whole else 0)
        at += whole
        if rest:
            left[at, 0] += rest
            left[at, 1] -= rest


def _prepare(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Target:
    """Owns a pool; takes what comes over its socket, or lets others write it."""

    def __init__(self, shape: Shape) -> None:
        self._pool = Pool(shape, 0)
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._receive, daemon=True).start()

    def where(self) -> tuple[int, int, Addresses]:
        """Port, process id, vectors of the pool."""
        return self._server.getsockname()[1], os.getpid(), self._pool.vectors()

    def _receive(self) -> None:
        vectors = self._pool.vectors()
        sock, _ = self._server.accept()
        _prepare(sock)
        while sock.recv(1):
            stream(sock.fileno(), vectors, send=False)
            sock.sendall(b"k")

    def content(self) -> int:
        return self._pool.content()

    def close(self) -> None:
        self._server.close()


class SocketSource:
    def __init__(self, shape: Shape, where: tuple[int, int, Addresses]) -> None:
        self._pool = Pool(shape, 3)
        self._vectors = self._pool.vectors()
        self._sock = socket.create_connection(("127.0.0.1", where[0]))
        _prepare(self._sock)

    def move(self) -> float:
        begin_s = time.perf_counter()
        self._sock.sendall(b"g")
        stream(self._sock.fileno(), self._vectors, send=True)
        if self._sock.recv(1) != b"k":
            raise RuntimeError("the other end is gone")
        return time.perf_counter() - begin_s

    def content(self) -> int:
        return self._pool.content()

    def close(self) -> None:
        self._sock.close()


class VmSource:
    def __init__(self, shape: Shape, where: tuple[int, int, Addresses]) -> None:
        self._pool = Pool(shape, 3)
        self._local = self._pool.vectors()
        _, self._pid, self._remote = where

    def move(self) -> float:
        begin_s = time.perf_counter()
        for at in range(0, len(self._local), _VECTORS_AT_ONCE):
            count = min(_VECTORS_AT_ONCE, len(self._local) - at)
            local, remote = (rows.ctypes.data + _VECTOR_BYTES * at for rows in (self._local, self._remote))
            moved = _LIBC.process_vm_writev(self._pid, local, count, remote, count, 0)
            if moved != count * self._pool.unit_bytes:
                raise OSError(ctypes.get_errno(), f"process_vm_writev moved {moved} bytes")
        return time.perf_counter() - begin_s

    def content(self) -> int:
        return self._pool.content()

    def close(self) -> None:
        """Nothing is open."""


class Copier:
    """memmove of everything at once, one thread."""

    def __init__(self, shape: Shape) -> None:
        self._source, self._target = Pool(shape, 3), Pool(shape, 0)

    def move(self) -> float:
        begin_s = time.perf_counter()
        ctypes.memmove(self._target.address, self._source.address, self._source.bytes)
        return time.perf_counter() - begin_s

    def equal(self) -> bool:
        return bool(np.array_equal(self._source.memory, self._target.memory))

    def close(self) -> None:
        """Nothing is open."""


class Memmove(Contender):
    remotes: Sequence[Remote] = ()

    def __init__(self, shape: Shape) -> None:
        super().__init__("memmove", shape)
        self._copier = Remote(Copier, shape)
        self.remotes = (self._copier,)

    def once(self) -> float:
        return float(self._copier.call("move"))

    def verify(self) -> bool:
        return bool(self._copier.call("equal"))


class Pair(Contender):
    """A source that moves, a target that is moved into. `source` is made from what the target's `where` says."""

    remotes: Sequence[Remote] = ()

    def __init__(self, name: str, shape: Shape, target: Remote, source: Callable[[Any], Remote]) -> None:
        super().__init__(name, shape)
        try:
            self._source = source(target.call("where"))
        except RemoteFailed:
            target.close()
            raise
        self._target = target
        self.remotes = (self._source, self._target)

    def once(self) -> float:
        return float(self._source.call("move"))

    def verify(self) -> bool:
        return bool(self._source.call("content") == self._target.call("content"))


def raw_socket(shape: Shape) -> Contender:
    return Pair("TCP socket", shape, Remote(Target, shape), lambda where: Remote(SocketSource, shape, where))


def vm_writev(shape: Shape) -> Contender:
    return Pair("process_vm_writev", shape, Remote(Target, shape), lambda where: Remote(VmSource, shape, where))
