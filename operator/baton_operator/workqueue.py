"""Keys that wait to be worked on: each at most once in line and at most once in work, failures later and later.

Invariants: a key added while it is in work runs once more afterwards, so no change is lost; a key is never worked on by
two workers at a time; back-off grows per key up to a cap and is forgotten on success. Time is passed in and nothing
here sleeps: `pop` says what is due, `next_due_s` when to come back. `worker` in `reconcile.py` does the waiting.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton_common.clock import Clock

K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """Delay after the nth failure in a row: first_s * 2^(n-1), capped, up to a quarter off so that keys spread."""

    first_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, failures: int, dice: random.Random) -> float:
        return min(self.cap_s, self.first_s * 2.0 ** min(failures - 1, 30)) * dice.uniform(0.75, 1.0)


class WorkQueue(Generic[K]):
    """Single-threaded; the owner is the event loop."""

    def __init__(self, clock: Clock, *, back_off: BackOff | None = None, dice: random.Random | None = None) -> None:
        self._clock = clock
        self._back_off = back_off or BackOff()
        self._dice = dice or random.Random()
        self._due: dict[K, float] = {}  # waiting, each with its time
        self._heap: list[tuple[float, int, K]] = []  # the same, ordered; entries that `_due` contradicts are stale
        self._working: set[K] = set()
        self._failures: dict[K, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        """Keys that wait, due or not."""
        return len(self._due)

    @property
    def ready(self) -> int:
        """Keys that are due now."""
        now_s = self._clock.now()
        return sum(due_s <= now_s for key, due_s in self._due.items() if key not in self._working)

    @property
    def working(self) -> int:
        return len(self._working)

    def add(self, key: K, *, after_s: float = 0.0) -> None:
        """Have it worked on not later than `after_s` from now; an earlier appointment stands.

        A key that backs off after failures keeps its appointment unless the new one says "now": something changed.
        """
        due_s = self._clock.now() + after_s
        if key in self._due and self._due[key] <= due_s:
            return
        self._due[key] = due_s
        self._serial += 1
        heapq.heappush(self._heap, (due_s, self._serial, key))

    def pop(self) -> K | None:
        """The key that waited longest past its time, now in work; None when none is due."""
        now_s = self._clock.now()
        busy: list[tuple[float, int, K]] = []
        found: K | None = None
        while self._heap and self._heap[0][0] <= now_s:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            if self._due.get(key) != entry[0]:
                continue  # an earlier appointment has taken its place
            if key in self._working:
                busy.append(entry)
                continue
            del self._due[key]
            self._working.add(key)
            found = key
            break
        for entry in busy:
            heapq.heappush(self._heap, entry)
        return found

    def succeed(self, key: K, *, again_s: float | None = None) -> None:
        """Out of work; failures forgotten. `again_s`: look at it again after that time."""
        self._working.discard(key)
        self._failures.pop(key, None)
        if again_s is not None:
            self.add(key, after_s=again_s)

    def fail(self, key: K, *, least_s: float = 0.0) -> float:
        """Out of work; returns after how many seconds it comes back. `least_s`: what the server asked for."""
        self._working.discard(key)
        self._failures[key] = self._failures.get(key, 0) + 1
        delay_s = max(least_s, self._back_off.delay_s(self._failures[key], self._dice))
        self.add(key, after_s=delay_s)
        return delay_s

    def forget(self, key: K) -> None:
        """The thing is gone: nothing about it is kept."""
        self._working.discard(key)
        self._failures.pop(key, None)

    def clear(self) -> None:
        """Nobody waits any more; what is in work stays so."""
        self._due.clear()
        self._heap.clear()
        self._failures.clear()

    def next_due_s(self) -> float | None:
        """Seconds until `pop` may have something; None: not before something is added or finished."""
        times = [due_s for key, due_s in self._due.items() if key not in self._working]
        return max(0.0, min(times) - self._clock.now()) if times else None
