"""A GPU that gets on only when it is told to. Its memory is the host's; kernels take effect at once, marks do not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_common.clock import SystemClock
from baton_engine.exec.cuda import CudaMemory, CudaStream, Patience
from baton_engine.exec.device import Device
from baton_kernels.capabilities import CPU
from baton_kernels.library import Library


@dataclass(frozen=True)
class FakeMark:
    cuda: FakeCuda
    number: int  # 1 = the first of this device

    def passed(self) -> bool:
        if self.cuda.broken is not None:
            raise self.cuda.broken
        return self.cuda.reached is None or self.number <= self.cuda.reached

    def seconds_since(self, earlier: FakeMark) -> float:
        assert self.passed(), "torch refuses to measure up to an event that is not done"
        return float(self.number - earlier.number)


class FakeCuda:
    """A CudaApi. `reached`: marks that the device has passed, None = every one at once."""

    def __init__(
        self, *, reached: int | None = 0, watch: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """`watch` makes a context that surrounds everything that runs with the stream current."""
        self.device = torch.device("cpu")
        self.reached = reached
        self.broken: Exception | None = None
        self.marks = 0
        self.pins: list[Tensor] = []
        self.adopted: list[str] = []
        self._watch = watch
        self._thread = threading.local()

    @property
    def is_current(self) -> bool:
        return getattr(self._thread, "depth", 0) > 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            with self._watch():
                yield
        finally:
            self._thread.depth -= 1

    def adopt_thread(self) -> None:
        self.adopted.append(threading.current_thread().name)

    def mark(self) -> FakeMark:
        if self.broken is not None:
            raise self.broken
        self.marks += 1
        return FakeMark(self, self.marks)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert self.is_current, "the host allocator notes the current stream"
        self.pins.append(torch.empty(tuple(shape), dtype=dtype))
        return self.pins[-1]

    def available_bytes(self) -> int:
        return 1 << 30


def fake_device(cuda: FakeCuda) -> Device:
    patience = Patience(SystemClock())
    return Device(
        name="cuda:0",
        torch_device=cuda.device,
        stream=CudaStream(cuda, patience),
        memory=CudaMemory(cuda, patience),
        library=Library(CPU),
        native_bf16=True,
        kv_fraction=0.85,
    )
