"""One process at a time writes into a folder, also when pods on several nodes share the volume.

The lock is a file that only one can create. It holds a record of its owner, rewritten every few seconds, and the owner
keeps an flock on it. On one kernel the flock tells a dead owner at once. Across nodes it may not reach; there a record
that stands still for a minute of the waiter's own clock is one of a dead owner, and clocks of two machines are never
compared. Should two take over at the same time, the second one's record stays and the first finds out and yields.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from baton_common.clock import Clock

log = logging.getLogger("baton.fetch")

_KERNEL = Path("/proc/sys/kernel/random/boot_id")
_POLL_S = 0.25
_SETTLE_S = 1.0     # at most, between a take-over and the belief in it
_SAY_EVERY_S = 10.0


class FolderLock:
    """`wait(seconds)` returns early, by an exception, when somebody asks for the end. `lost` is set on a take-over."""

    def __init__(
        self, path: Path, *, clock: Clock, wait: Callable[[float], None], lost: threading.Event, beat_s: float,
        stale_s: float,
    ) -> None:  # fmt: skip
        self._path, self._clock, self._wait = path, clock, wait
        self._beat_s, self._stale_s = beat_s, stale_s
        self._settle_s = min(_SETTLE_S, stale_s / 4)  # long before others could think that we are gone, too
        self._token = uuid.uuid4().hex
        self._kernel = _kernel()
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None
        self._beats = 0
        self._lost = lost

    def acquire(self, reusable: Callable[[], bool]) -> bool:
        """Blocks until the lock is ours, or until `reusable`: then False. Raises OSError when it cannot write."""
        seen, since_s, said_s = "", self._clock.now(), self._clock.now() - _SAY_EVERY_S
        while True:
            if self._create():
                return True
            if reusable():
                return False
            record = self._read()
            if record != seen:
                seen, since_s = record, self._clock.now()
            if record and (self._owner_died(record) or self._clock.now() - since_s >= self._stale_s):
                log.warning("taking over from %s, which is gone", _owner(record))
                if self._take_over():
                    return True
            if self._clock.now() - said_s >= _SAY_EVERY_S:
                said_s = self._clock.now()
                log.info("%s is fetching into the same folder; waiting for it", _owner(record))
            self._wait(_POLL_S)

    def release(self) -> None:
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self._descriptor is not None:
            if self._is_ours():
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o664)
        except FileExistsError:
            return False
        self._hold(descriptor)
        return True

    def _take_over(self) -> bool:
        mine = self._path.with_name(f"lock.{self._token}")
        descriptor = os.open(mine, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o664)
        _flock(descriptor)
        self._write(descriptor)
        mine.replace(self._path)
        self._wait(self._settle_s)
        if self._is_ours():
            self._hold(descriptor)
            return True
        os.close(descriptor)
        return False

    def _hold(self, descriptor: int) -> None:
        _flock(descriptor)      # before the record: a record without an flock is one of the dead
        self._write(descriptor)
        self._descriptor = descriptor
        self._beating = threading.Thread(target=self._beat, name="baton-fetch-lock", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            if not self._is_ours():
                self._lost.set()
                return
            if self._descriptor is not None:
                with contextlib.suppress(OSError):  # a full or slow volume is for the transfer to complain about
                    self._write(self._descriptor)

    def _write(self, descriptor: int) -> None:
        self._beats += 1
        record = {"owner": socket.gethostname(), "token": self._token, "kernel": self._kernel, "beat": self._beats}
        os.pwrite(descriptor, json.dumps(record).encode(), 0)     # never gets shorter
        os.fsync(descriptor)                                      # other nodes see it

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except OSError:
            return ""

    def _is_ours(self) -> bool:
        return self._token in self._read()

    def _owner_died(self, record: str) -> bool:
        """Only ever true when the owner ran on this kernel."""
        if not self._kernel or f'"{self._kernel}"' not in record:
            return False
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.pread(descriptor, len(record) + 1, 0).decode() == record
            return same and os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except OSError:
            return False
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # file systems without flock: the record alone decides
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _kernel() -> str:
    try:
        return _KERNEL.read_text().strip()
    except OSError:
        return ""


def _owner(record: str) -> str:
    try:
        return str(json.loads(record)["owner"])
    except (ValueError, LookupError, TypeError):
        return "another process"
