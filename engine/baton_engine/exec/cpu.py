"""The CPU as a device: one daemon thread that runs launches in order, and memory that is the host's own.

It does not know steps, models or requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_engine.exec.stream import CLOSE_TIMEOUT_S, Fence, Launch

T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


class _ThreadLaunch(Generic[T]):
    """A raw lock is the cheapest one-shot event there is: held until the work has ended."""

    __slots__ = ("_clock", "_elapsed_s", "_ended", "_error", "_finished", "_value", "_work")

    def __init__(self, work: Callable[[], T], clock: Clock) -> None:
        self._work: Callable[[], T] | None = work
        self._clock = clock
        self._value: T | None = None
        self._error: BaseException | None = None
        self._elapsed_s = 0.0
        self._finished = False
        self._ended = threading.Lock()
        self._ended.acquire()

    @property
    def fence(self) -> Fence:
        return self

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_s

    def run(self) -> None:
        assert self._work is not None
        began_s = self._clock.now()
        try:
            self._value = self._work()
        except BaseException as error:  # even SystemExit belongs to whoever asks for the result
            self._error = error
        self._elapsed_s = self._clock.now() - began_s
        self._work = None  # closures hold plans and tensors; a fence kept by a page must not keep those
        self._finished = True
        self._ended.release()

    def done(self) -> bool:
        return self._finished

    def wait(self, timeout_s: float) -> bool:
        if not self._finished and self._ended.acquire(timeout=max(timeout_s, 0.0)):
            self._ended.release()
        return self._finished

    def result(self) -> T:
        if not self._finished:
            raise BatonError("a launch was asked for its result before it ended")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # T may itself be None


class ThreadStream:
    """A Stream on one daemon thread."""

    def __init__(self, threads: int | None, clock: Clock) -> None:
        """`threads`: size of the compute team, None = torch's own choice."""
        self._queue: SimpleQueue[_ThreadLaunch[object] | None] = SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._threads = threads
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="baton-device", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Launch[T]:
        launch = _ThreadLaunch(work, self._clock)
        with self._door:  # nothing may slip in behind the sentinel of `close`, it would never end
            if self._closed:
                raise BatonError("the device is closed; no work can be submitted")
            self._queue.put(launch)  # type: ignore[arg-type]  # the queue never looks at T
        return launch

    def after(self, callback: Callable[[], None]) -> None:
        callback()  # the work is in stream order already, and what it raises is the launch's error

    def close(self) -> None:
        with self._door:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        # The OpenMP team size is a property of each thread: without this call a new thread takes all cores.
        torch.set_num_threads(self._threads or torch.get_num_threads())
        with torch.inference_mode():
            while (launch := self._queue.get()) is not None:
                launch.run()


class HostMemory:
    """A Memory that copies only where it must."""

    def upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def download(self, tensor: Tensor) -> Tensor:
        return tensor

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def available_bytes(self) -> int:
        return available_bytes()


def available_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """What the machine has left, or the container's limit if that is less; caches of unused files count as left."""
    found = [_machine_bytes(meminfo)]
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int((cgroup / "memory.current").read_text()) + _cached_bytes(cgroup))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or no limit: the machine's number stands
    return max(min(found), 0)


def _cached_bytes(cgroup: Path) -> int:
    """Of files that nobody uses at the moment: given up as soon as the container needs memory."""
    fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(fields.get("inactive_file", 0))


def _machine_bytes(meminfo: Path) -> int:
    try:
        fields: Mapping[str, str] = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def native_bf16() -> bool:
    """Whether bfloat16 products are instructions of this CPU."""
    # torch has no public question for this in all versions that we support
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
