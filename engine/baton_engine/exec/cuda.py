"""A GPU as a device, NVIDIA's or AMD's: torch calls both "cuda". One stream, events as fences, pinned staging.

Work runs on the thread that submits it and only queues kernels; marks (events) in the stream say when the device got
there. One watcher thread calls back when a mark is passed. Waiting is asking with growing pauses: it has a deadline,
which the driver's own waits lack. No thread touches another GPU: a stray context costs half a GiB there.
Numerics are torch's defaults, as in `transformers`. It does not know steps, models or requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import cycle
from queue import SimpleQueue
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_common.clock import Clock
from baton_common.errors import BatonError, ConfigError
from baton_engine.exec.stream import CLOSE_TIMEOUT_S, Fence, Launch

log = logging.getLogger("baton.device")

T = TypeVar("T")

STAGING_BYTES = 64 << 20  # of each of two buffers: one is filled while the other one is on its way
_COPY_TIMEOUT_S = 60.0
_LOOK_UP_S = 1.0  # how often a watcher that waits asks whether the device was given up
_LEAST_PAUSE_S, _MOST_PAUSE_S = 20e-6, 1e-3
_PAUSES = 16  # a wait is overslept by at most this part of itself: 6 %


class Mark(Protocol):
    """A point in the stream."""

    def passed(self) -> bool:
        """Whether the device got there. Raises what broke the device."""

    def seconds_since(self, earlier: Self) -> float:
        """Between two passed marks, by the device's clock."""


class CudaApi(Protocol):
    """What this file needs of torch.cuda, for one device and one stream."""

    @property
    def device(self) -> torch.device: ...

    def current(self) -> AbstractContextManager[None]:
        """Make device and stream those of the calling thread."""

    def adopt_thread(self) -> None:
        """Make the device that of the calling thread, for good."""

    def mark(self) -> Mark:
        """Behind all that is queued."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory that the device reads and writes by itself.

        The caching host allocator keeps a freed block until the non-blocking copies that used it have ended; it notes
        the current stream at each copy, so copies belong inside `current`.
        """

    def available_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _EventMark:
    event: torch.cuda.Event

    def passed(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: _EventMark) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1000.0


class TorchCuda:
    """The CudaApi of torch, with a stream of its own."""

    def __init__(self, index: int) -> None:
        """ConfigError when the GPU cannot be opened."""
        self.device = torch.device("cuda", index)
        try:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            card = torch.cuda.get_device_properties(self.device)
        except RuntimeError as error:
            raise ConfigError(f"{self.device} cannot be used ({_first_line(error)})", param="device") from None
        self.native_bf16 = torch.version.hip is not None or card.major >= 8
        log.info("GPU open", extra={"device": str(self.device), "card": card.name, "memory_bytes": card.total_memory})

    def beside(self) -> TorchCuda:
        """The same device with another stream."""
        other = copy(self)
        other._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return other

    @contextmanager
    def current(self) -> Iterator[None]:
        # The device first: torch.cuda.stream alone asks for the current stream of whatever device was current.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def adopt_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def mark(self) -> _EventMark:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _EventMark(event)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        # What the allocator holds without using it goes back to the driver before an allocation fails.
        return int(free) + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)


@dataclass(frozen=True, slots=True)
class Patience:
    """Waits by asking, first every few microseconds, then ever less often, at last every millisecond."""

    clock: Clock
    sleep: Callable[[float], None] = time.sleep

    def until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Block until `done()`, at most `timeout_s`; false = it is not."""
        began_s = self.clock.now()
        while not done():
            waited_s = self.clock.now() - began_s
            if waited_s >= timeout_s:
                return False
            self.sleep(min(max(waited_s / _PAUSES, _LEAST_PAUSE_S), _MOST_PAUSE_S))
        return True


class _CudaLaunch(Generic[T]):
    """Ended when the mark behind its work is passed and its last callback has returned."""

    __slots__ = ("_begin", "_elapsed_s", "_end", "_error", "_finished", "_last_call", "_patience", "_value")

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._begin: Mark | None = None
        self._end: Mark | None = None
        self._last_call: _Call | None = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self._elapsed_s = 0.0
        self._finished = False

    @property
    def fence(self) -> Fence:
        return self

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_s

    @property
    def failed(self) -> bool:
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """The first error stands; what follows it is mostly its consequence."""
        if self._error is None:
            self._error = error

    def run(self, work: Callable[[], T], api: CudaApi) -> None:
        """Queue the work. Also when it raises the launch ends only after what it had queued by then."""
        try:
            self._begin = api.mark()
            self._value = work()
        except BaseException as error:  # even SystemExit belongs to whoever asks for the result
            self.fail(error)
        try:
            self._end = api.mark()
        except Exception as error:  # the device is broken: nothing queued touches memory any more
            self.fail(error)
            self._finished = True

    def call_later(self, call: _Call) -> None:
        self._last_call = call

    def done(self) -> bool:
        if not self._finished:
            self._settle()
        return self._finished

    def _settle(self) -> None:
        assert self._end is not None
        try:
            if not self._end.passed() or not (self._last_call is None or self._last_call.ended):
                return
            if self._begin is not None:
                self._elapsed_s = self._end.seconds_since(self._begin)
        except Exception as error:  # as above; `result` tells it
            self.fail(error)
        self._last_call = None
        self._finished = True

    def wait(self, timeout_s: float) -> bool:
        return self._patience.until(self.done, timeout_s)

    def result(self) -> T:
        if not self._finished:
            raise BatonError("a launch was asked for its result before it ended")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # T may itself be None


class _Call:
    """A callback that waits for its mark."""

    __slots__ = ("callback", "ended", "launch", "mark")

    def __init__(self, mark: Mark, callback: Callable[[], None], launch: _CudaLaunch[Any]) -> None:
        self.mark = mark
        self.callback = callback
        self.launch = launch
        self.ended = False


class CudaStream:
    """A Stream on a GPU. Owner of the watcher thread."""

    def __init__(self, api: CudaApi, patience: Patience) -> None:
        self._api = api
        self._patience = patience
        self._door = threading.Lock()  # held while work queues: the kernels of two launches never mix
        self._closed = False
        self._running: _CudaLaunch[Any] | None = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._abandoned = False
        self._watcher = threading.Thread(target=self._watch, name="baton-device", daemon=True)
        self._watcher.start()

    def submit(self, work: Callable[[], T]) -> Launch[T]:
        launch: _CudaLaunch[T] = _CudaLaunch(self._patience)
        with self._door:
            if self._closed:
                raise BatonError("the device is closed; no work can be submitted")
            self._running = launch
            with self._api.current(), torch.inference_mode():
                launch.run(work, self._api)
            self._running = None
        return launch

    def after(self, callback: Callable[[], None]) -> None:
        launch = self._running
        assert launch is not None, "callbacks belong to work that is being submitted"
        call = _Call(self._api.mark(), callback, launch)
        launch.call_later(call)
        self._calls.put(call)

    def close(self) -> None:
        with self._door:
            if self._closed:
                return
            self._closed = True
            self._calls.put(None)
            try:
                ended = self._patience.until(self._api.mark().passed, CLOSE_TIMEOUT_S)
            except Exception:
                log.exception("the device is closed, but it was broken")
                ended = False
            if not ended:
                log.error("the device is closed with work that has not ended")
                self._abandoned = True
        if threading.current_thread() is not self._watcher:
            self._watcher.join(CLOSE_TIMEOUT_S)

    def _watch(self) -> None:
        self._api.adopt_thread()
        with torch.inference_mode():
            while (call := self._calls.get()) is not None:
                self._answer(call)

    def _answer(self, call: _Call) -> None:
        try:
            while not self._patience.until(call.mark.passed, _LOOK_UP_S):
                if self._abandoned:
                    raise BatonError("the device was closed while it hung")
            if not call.launch.failed:
                call.callback()
        except BaseException as error:
            call.launch.fail(error)
        call.ended = True


class _Staging:
    """A pinned buffer, and when the device has read it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # uint8[STAGING_BYTES], pinned
        self.read: Mark | None = None


class CudaMemory:
    """A Memory of a GPU. Copies go through pinned memory, in the order of the stream."""

    def __init__(self, api: CudaApi, patience: Patience) -> None:
        self._api = api
        self._patience = patience
        self._staging: Iterator[_Staging] | None = None

    def upload(self, array: NDArray[Any]) -> Tensor:
        source = torch.from_numpy(array)
        with self._api.current():
            staged = self._api.pinned(source.shape, source.dtype).copy_(source)
            return staged.to(self._api.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        with self._api.current():
            return self._api.pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape, f"{list(source.shape)} does not fill {list(target.shape)}"
        to, of = target.view(-1), source.reshape(-1)
        size = STAGING_BYTES // target.element_size()
        with self._api.current():
            for begin in range(0, len(of), size):
                part = of[begin : begin + size]
                staging = self._next_staging()
                # The dtype changes here, on the host: the device never holds a second copy.
                staged = staging.buffer.view(target.dtype)[: len(part)].copy_(part)
                to[begin : begin + size].copy_(staged, non_blocking=True)
                staging.read = self._api.mark()

    def available_bytes(self) -> int:
        return self._api.available_bytes()

    def _next_staging(self) -> _Staging:
        """The buffer that was used longest ago. They stay for life: pinning again costs more than they do."""
        if self._staging is None:
            with torch.inference_mode(False):  # or only work in inference mode could fill them
                self._staging = cycle([_Staging(self._api.pinned((STAGING_BYTES,), torch.uint8)) for _ in range(2)])
        staging = next(self._staging)
        if staging.read is not None and not self._patience.until(staging.read.passed, _COPY_TIMEOUT_S):
            raise BatonError(f"{self._api.device} did not take a copy in {_COPY_TIMEOUT_S:.0f} s; it hangs")
        return staging


def usable_index(index: int | None) -> int:
    """The GPU asked for, the first by default. ConfigError, with what to do, when it cannot be there."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"torch {torch.__version__} is built without GPU support; install its CUDA or ROCm build, "
            f"or use --device cpu",
            param="device",
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            f"no GPU is visible to this process{_why_none()}; check the driver, the container's GPU request and "
            f"CUDA_VISIBLE_DEVICES, or use --device cpu",
            param="device",
        )
    if index is not None and index >= count:
        seen = "cuda:0 only" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"there is no cuda:{index}: this process sees {count} GPUs, {seen}", param="device")
    return index or 0


def _why_none() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f" ({_first_line(error).split('. ')[0]})"
    return ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
