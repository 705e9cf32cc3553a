"""Who may touch the pages of one transfer, across threads.

A transfer thread enters before it gathers or scatters; whoever ends the transfer closes the gate. Closed is for ever:
no copy starts after `close` returned, and `done` says when the running one is over. A gate is a Fence.
"""

from __future__ import annotations

import threading


class Gate:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._inside = 0

    def enter(self) -> bool:
        """False = closed: do not touch the pages. After True, `leave` must follow."""
        with self._lock:
            if self._closed:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def done(self) -> bool:
        with self._lock:
            return self._closed and self._inside == 0
