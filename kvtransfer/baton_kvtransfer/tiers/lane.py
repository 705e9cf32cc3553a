"""A thread with two queues: urgent jobs go before others, one at a time. What hangs in one lane holds up no other.

One lane for each tier, one for copies between the pools. Queues are bounded, in jobs or in the pages that they name:
what does not fit is not done.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

Job = Callable[[], None]


@dataclass(slots=True)
class _Queue:
    most: int
    size: int = 0
    jobs: deque[tuple[int, Job]] = field(default_factory=deque)


class Lane:
    def __init__(
        self, name: str, *, most_urgent: int, most_others: int, first: Job | None = None, last: Job | None = None
    ) -> None:
        """`first` and `last` run on its thread before and after all jobs."""
        self._urgent = _Queue(most_urgent)
        self._others = _Queue(most_others)
        self._changed = threading.Condition()
        self._closed = False
        self._first = first
        self._last = last
        self._thread = threading.Thread(target=self._run, name=f"baton-tier-{name}", daemon=True)
        self._thread.start()

    def urgent(self, job: Job, size: int = 1) -> bool:
        """False: there is too much to do, or the lane is closed; the job will not be done."""
        return self._add(self._urgent, job, size)

    def later(self, job: Job, size: int = 1) -> bool:
        return self._add(self._others, job, size)

    def close(self, timeout_s: float) -> None:
        """Takes no more jobs; does what it has for so long, and drops the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            self._urgent.jobs.clear()
            self._others.jobs.clear()

    def _add(self, queue: _Queue, job: Job, size: int) -> bool:
        with self._changed:
            if self._closed or (queue.jobs and queue.size + size > queue.most):
                return False
            queue.jobs.append((size, job))
            queue.size += size
            self._changed.notify()
            return True

    def _next(self) -> Job | None:
        with self._changed:
            while not self._urgent.jobs and not self._others.jobs:
                if self._closed:
                    return None
                self._changed.wait()
            queue = self._urgent if self._urgent.jobs else self._others
            size, job = queue.jobs.popleft()
            queue.size -= size
            return job

    def _run(self) -> None:
        self._do(self._first)
        while (job := self._next()) is not None:
            self._do(job)
        self._do(self._last)

    def _do(self, job: Job | None) -> None:
        try:
            if job is not None:
                job()
        except Exception:  # a defect of ours must not stop the lane
            log.exception("a job of a tier failed")
