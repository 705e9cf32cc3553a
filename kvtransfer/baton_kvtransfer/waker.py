"""Wakes a thread that polls descriptors, from any other thread."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """`wake` costs one small write, and none when a wake is pending already."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._pending = False

    def fileno(self) -> int:
        return self._read.fileno()

    def wake(self) -> None:
        if not self._pending:
            self._pending = True
            with contextlib.suppress(OSError):  # closed: nobody is left to wake
                self._write.send(b"\0")

    def clear(self) -> None:
        """Call before looking for work, so that work posted meanwhile wakes again."""
        with contextlib.suppress(OSError):
            self._read.recv(64)
        self._pending = False

    def close(self) -> None:
        self._read.close()
        self._write.close()
