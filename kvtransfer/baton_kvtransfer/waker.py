"""Wakes a thread that polls descriptors, from any other thread."""

from __future__ import annotations

import contextlib
import os

_ONE = (1).to_bytes(8, "little")


class Waker:
    """`wake` costs one small write, and none when a wake is pending already."""

    def __init__(self) -> None:
        # a file object, not the number: that one may be somebody else's as soon as it is closed
        self._event = os.fdopen(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "r+b", buffering=0)
        self._pending = False

    def fileno(self) -> int:
        return self._event.fileno()

    def wake(self) -> None:
        if not self._pending:
            self._pending = True
            with contextlib.suppress(ValueError):  # closed: nobody is left to wake
                self._event.write(_ONE)

    def clear(self) -> None:
        """Call when the descriptor is readable, before looking for work: what is posted meanwhile wakes again."""
        self._event.read(8)
        self._pending = False

    def close(self) -> None:
        self._event.close()
