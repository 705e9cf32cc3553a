"""One file from a source onto the disk: ranges read by several threads, written in order, hashed on the way.

Because the half file only grows at its end, it is always a valid beginning: after a kill its length is all that has
to be known, and what lay in memory, a fraction of a second of transfer, is fetched again. What is on the disk from
before is read once for the hash. The size of a range follows the measured rate. Knows neither files nor places.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path

from baton_fetch.digests import Hasher
from baton_fetch.errors import Unavailable
from baton_fetch.patience import Patience
from baton_fetch.progress import Progress
from baton_fetch.source import RemoteFile, Source

STREAMS = 8
_SMALLEST_RANGE, _LARGEST_RANGE = 512 << 10, 8 << 20    # bytes
_RANGE_S = 0.25     # how long one range should take
_LOOK_S = 0.25      # how often a waiting transfer looks whether it should end
_READ_BYTES = 8 << 20


class Readers:
    """Threads that read ranges. Daemons: a process that should end does not wait for a server that says nothing."""

    def __init__(self, count: int = STREAMS) -> None:
        self.count = count
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for index in range(count):
            threading.Thread(target=self._work, name=f"baton-fetch-{index}", daemon=True).start()

    def submit(self, read: Callable[[], bytes]) -> Future[tuple[bytes, float]]:
        """The bytes, and the seconds that reading them took."""
        future: Future[tuple[bytes, float]] = Future()

        def job() -> None:
            begun_s = time.monotonic()
            try:
                future.set_result((read(), time.monotonic() - begun_s))
            except Exception as error:  # whatever it is, it is for the thread that waits
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def _work(self) -> None:
        while True:
            self._jobs.get()()


@dataclass(slots=True, kw_only=True)
class _Range:
    begin: int
    end: int
    future: Future[tuple[bytes, float]]


@dataclass(slots=True, kw_only=True)
class Transfer:
    """`check()` raises when the transfer should end."""

    source: Source
    readers: Readers
    patience: Patience
    progress: Progress
    check: Callable[[], None]
    _range_bytes: int = _SMALLEST_RANGE

    def complete(self, file: RemoteFile, part: Path, hasher: Hasher) -> None:
        """Makes `part` whole and feeds all of it to `hasher`. On any error `part` is a valid beginning of the file."""
        with part.open("ab") as target:
            if target.tell() > file.size_bytes:
                target.truncate(0)
            begin = self._rehash(part, hasher)
            self.progress.reused_bytes += begin
            try:
                self._append(file, begin, target.write, hasher)
            finally:
                target.flush()
            os.fsync(target.fileno())

    def _rehash(self, part: Path, hasher: Hasher) -> int:
        begin = 0
        with part.open("rb") as known:
            while data := known.read(_READ_BYTES):
                self.check()
                hasher.update(data)
                begin += len(data)
        return begin

    def _append(self, file: RemoteFile, begin: int, write: Callable[[bytes], int], hasher: Hasher) -> None:
        window: deque[_Range] = deque()
        asked = begin
        while asked < file.size_bytes or window:
            while asked < file.size_bytes and len(window) < self.readers.count:
                end = min(asked + self._range_bytes, file.size_bytes)
                window.append(self._ask(file, asked, end))
                asked = end
            self.check()
            try:
                data, seconds = window[0].future.result(timeout=_LOOK_S)
            except NotYet:
                continue
            except Unavailable as error:
                self.patience.failed(error)
                self._ask_again(file, window)
                continue
            window.popleft()
            self.patience.succeeded()
            write(data)
            hasher.update(data)
            self.progress.fetched(len(data), file.name)
            self._adapt(len(data), seconds)

    def _ask(self, file: RemoteFile, begin: int, end: int) -> _Range:
        def read() -> bytes:
            data = self.source.read(file, begin, end)
            if len(data) != end - begin:
                raise Unavailable(f"{file.name}: the answer was cut off after {len(data)} of {end - begin} bytes")
            return data

        return _Range(begin=begin, end=end, future=self.readers.submit(read))

    def _ask_again(self, file: RemoteFile, window: deque[_Range]) -> None:
        """All that failed; what else is under way or done is kept."""
        for index, item in enumerate(window):
            if item.future.done() and isinstance(item.future.exception(), Unavailable):
                window[index] = self._ask(file, item.begin, item.end)

    def _adapt(self, size_bytes: int, seconds: float) -> None:
        wanted = int(size_bytes / max(seconds, 1e-3) * _RANGE_S)
        self._range_bytes = max(_SMALLEST_RANGE, min(wanted, 2 * self._range_bytes, _LARGEST_RANGE))
