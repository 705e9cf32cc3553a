"""A folder of pages: one file per page, published by renaming, found again after a restart.

Invariants: a file with the suffix of pages was written whole by somebody (a crash of the machine can still empty it:
readers verify); the files of all models together never take more than the quota, the least recently used go first; one
process uses the folder at a time. Times of use are kept as the files' own, so their order survives too.
The folder is read and written through the page cache: a page is one large sequential call, for which asynchronous
interfaces gain nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from baton_kvtransfer.tiers.frames import TierKey
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.tier import TierFault

_PAGE = ".page"
_UNFINISHED = ".part"
_DISK_BLOCK = 4096


class FileTier:
    name = "file"

    def __init__(self, folder: Path, *, quota_bytes: int, metrics: TierMetrics) -> None:
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._metrics = metrics
        self._lock = -1
        self._sizes: OrderedDict[TierKey, int] = OrderedDict()  # that each takes of the disk; first = next to go
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def open(self) -> None:
        """Reads the names of all files: about 10 µs each."""
        self.close()
        self._sizes.clear()
        self._bytes = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise TierFault(f"another process uses {self._folder}; give every worker a folder of its own") from None
        self._lock = lock
        found: list[tuple[float, TierKey, int]] = []
        for shelf in os.scandir(self._folder):
            if shelf.is_dir():
                found += _pages(Path(shelf.path))
        for _, key, size in sorted(found):
            self._sizes[key] = size
        self._bytes = sum(self._sizes.values())

    def has(self, keys: Sequence[TierKey]) -> int:
        for count, key in enumerate(keys):
            if key not in self._sizes:
                return count
        return len(keys)

    def put(self, key: TierKey, frame: memoryview) -> bool:
        if key in self._sizes:
            self._used(key)
            return True
        size = _on_disk(frame.nbytes)
        if size > self._quota_bytes:
            return False
        while self._bytes + size > self._quota_bytes:
            self.delete(next(iter(self._sizes)))
            self._metrics.evictions.labels(self.name).inc()
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            _write(unfinished, frame)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise
        self._sizes[key] = size
        self._bytes += size
        return True

    def get(self, key: TierKey, out: memoryview) -> int:
        if key not in self._sizes:
            return 0
        try:
            size = _read(self._path(key), out)
        except FileNotFoundError:
            self._forget(key)
            return 0
        self._used(key)
        return size

    def delete(self, key: TierKey) -> None:
        self._forget(key)
        with suppress(FileNotFoundError):
            self._path(key).unlink()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _forget(self, key: TierKey) -> None:
        self._bytes -= self._sizes.pop(key, 0)

    def _used(self, key: TierKey) -> None:
        self._sizes.move_to_end(key)
        with suppress(OSError):  # of a disk that can only be read
            os.utime(self._path(key))

    def _path(self, key: TierKey) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}{_PAGE}"


def _pages(shelf: Path) -> list[tuple[float, TierKey, int]]:
    """(time of use, key, size) of every page; what a killed process left unfinished is deleted."""
    pages = []
    for entry in os.scandir(shelf):
        path = Path(entry.path)
        if path.suffix == _UNFINISHED:
            path.unlink()
        elif path.suffix == _PAGE:
            status = entry.stat()
            with suppress(ValueError):  # not a name of ours
                pages.append((status.st_mtime, TierKey(bytes.fromhex(path.stem)), _on_disk(status.st_size)))
    return pages


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK


def _write(path: Path, frame: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < frame.nbytes:
            done += os.pwrite(file, frame[done:], done)
    finally:
        os.close(file)


def _read(path: Path, out: memoryview) -> int:
    """Size of the file; `out` has as much of it as fits."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        done = 0
        while done < min(size, out.nbytes):
            count = os.preadv(file, [out[done:]], done)
            if not count:  # it became shorter
                return done
            done += count
        return size
    finally:
        os.close(file)
