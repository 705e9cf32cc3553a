"""Wakes a thread that polls descriptors, from any other thread."""

from __future__ import annotations

import contextlib
import os
import threading


class Waker:
    """`wake` costs one small write, and none when a wake is pending already; after `close` it does nothing.

    All but `wake` belong to the thread that is woken.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pending = False
        self._lock = threading.Lock()  # a number that was closed may be somebody else's descriptor at once
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        if self._pending:
            return
        with self._lock:
            if not self._closed:
                self._pending = True
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Call when the descriptor is readable, before looking for work: what is posted meanwhile wakes again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._pending = False

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
