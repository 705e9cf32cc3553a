"""The device a worker computes on: a name, a torch device, and one ordered stream of launches.

The planning thread submits, the stream executes in order of submission, and a launch is observed by polling or by a
bounded wait. On the CPU the stream is one daemon thread; on an accelerator it will be a stream with events, and
`submit` will return as soon as the kernels are queued. Nothing outside this file knows which.
It does not know steps, models or requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch

from baton_common.errors import BatonError, ConfigError

log = logging.getLogger("baton.device")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CLOSE_TIMEOUT_S = 30.0
_LONG_WORK_S = 60.0


class Fence(Protocol):
    """Polled; once true it stays true. Cheap enough to ask for every page of every step."""

    def done(self) -> bool: ...


class Launch(Protocol[T_co]):
    """One submitted piece of work, its fence and its outcome."""

    @property
    def fence(self) -> Fence: ...

    def done(self) -> bool:
        """True once the work has ended, well or badly."""

    def wait(self, timeout_s: float) -> bool:
        """Block until it has ended, at most `timeout_s`; false = it has not."""

    def result(self) -> T_co:
        """What the work returned, or its exception again. BatonError when it has not ended: `wait` first."""


class Stream(Protocol):
    """Ordered queue of launches: one starts only when all earlier ones have ended. A failed one does not stop it."""

    def submit(self, work: Callable[[], T]) -> Launch[T]:
        """Queue `work`; returns at once. It runs under torch.inference_mode. BatonError after `close`."""

    def close(self) -> None:
        """Let everything queued end, then release the thread or the handle. Safe to call twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where tensors live and where work on them runs."""

    name: str
    torch_device: torch.device
    stream: Stream
    native_bf16: bool  # without it a bfloat16 product is emulated: five times slower than float32 on such a CPU

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` behind what is queued and wait for it, however long it takes; its exception comes out here.

        Loading goes this way too: on a CPU, a second thread that ever started a compute team of its own makes every
        later step slower, because the teams together outnumber the cores and fall asleep at each barrier.
        Unlike a step it runs outside inference mode: other threads may write into the tensors that it makes.
        """

        def plainly() -> T:
            with torch.inference_mode(False):
                return work()

        launch = self.stream.submit(plainly)
        while not launch.wait(_LONG_WORK_S):
            log.info("the device is still busy with one piece of work", extra={"seconds": _LONG_WORK_S})
        return launch.result()

    def close(self) -> None:
        self.stream.close()


class _ThreadLaunch(Generic[T]):
    """A raw lock is the cheapest one-shot event there is: held until the work has ended."""

    __slots__ = ("_ended", "_error", "_finished", "_value", "_work")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._value: T | None = None
        self._error: BaseException | None = None
        self._finished = False
        self._ended = threading.Lock()
        self._ended.acquire()

    @property
    def fence(self) -> Fence:
        return self

    def run(self) -> None:
        assert self._work is not None
        try:
            self._value = self._work()
        except BaseException as error:  # even SystemExit belongs to whoever asks for the result
            self._error = error
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


class _ThreadStream:
    """One daemon thread that runs launches in order."""

    def __init__(self, threads: int | None) -> None:
        self._queue: SimpleQueue[_ThreadLaunch[object] | None] = SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._threads = threads
        self._thread = threading.Thread(target=self._run, name="baton-device", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Launch[T]:
        launch = _ThreadLaunch(work)
        with self._door:  # nothing may slip in behind the sentinel of `close`, it would never end
            if self._closed:
                raise BatonError("the device is closed; no work can be submitted")
            self._queue.put(launch)  # type: ignore[arg-type]  # the queue never looks at T
        return launch

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


def _open_cpu(threads: int | None) -> Device:
    # torch has no public question for this in all versions that we support
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Device(
        name="cpu", torch_device=torch.device("cpu"), stream=_ThreadStream(threads), native_bf16=bool(native)
    )


_OPENERS: Mapping[str, Callable[[int | None], Device]] = {"cpu": _open_cpu}


def open_device(name: str, *, threads: int | None = None) -> Device:
    """Device by name. `threads`: size of the compute team on a CPU, None = torch's own choice.

    ConfigError for a name that is not in the table.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        raise ConfigError(
            f"no device {name!r} in this build; use one of: {', '.join(sorted(_OPENERS))}", param="device"
        )
    if threads is not None and threads < 1:
        raise ConfigError(f"a device needs at least one compute thread, got {threads}", param="threads")
    return opener(threads)
