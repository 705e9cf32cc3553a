"""The device a worker computes on: a name, a torch device, its stream and its memory; and how one is opened by name.

Everything that uses a device goes through this record, so a CPU and a GPU differ by one row of a table.
It does not know steps, models or requests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_common.clock import Clock, SystemClock
from baton_common.errors import ConfigError
from baton_engine.exec import cpu, cuda
from baton_engine.exec.stream import Fence, Launch, Memory, Stream
from baton_kernels.capabilities import of_device
from baton_kernels.library import Library

__all__ = ["Device", "Fence", "Launch", "Memory", "Stream", "open_device"]

log = logging.getLogger("baton.device")

T = TypeVar("T")

_LONG_WORK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where tensors live and where work on them runs."""

    name: str
    torch_device: torch.device
    stream: Stream
    memory: Memory
    library: Library  # kernels for it
    native_bf16: bool  # without it a bfloat16 product is emulated: five times slower than float32 on such a CPU
    kv_fraction: float  # of the available memory that a KV pool takes unless told otherwise

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

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See Memory."""
        return self.memory.upload(array)

    def download(self, tensor: Tensor) -> Tensor:
        """See Memory."""
        return self.memory.download(tensor)

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """See Memory."""
        self.memory.copy_in(target, source)

    def available_bytes(self) -> int:
        """See Memory."""
        return self.memory.available_bytes()

    def close(self) -> None:
        self.stream.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What was asked for beside the kind of device."""

    index: int | None
    threads: int | None
    clock: Clock
    kernels: Mapping[str, str]


def _open_cpu(order: _Order) -> Device:
    if order.index is not None:
        raise ConfigError("the CPU is one device; use --device cpu", param="device")
    return Device(
        name="cpu",
        torch_device=(device := torch.device("cpu")),
        stream=cpu.ThreadStream(order.threads, order.clock),
        memory=cpu.HostMemory(),
        library=Library(of_device(device), force=order.kernels),
        native_bf16=cpu.native_bf16(),
        kv_fraction=0.25,  # the rest of the machine lives there too
    )


def _open_cuda(order: _Order) -> Device:
    api = cuda.TorchCuda(cuda.usable_index(order.index))
    patience = cuda.Patience(order.clock)
    return Device(
        name=str(api.device),
        torch_device=api.device,
        stream=cuda.CudaStream(api, patience),
        memory=cuda.CudaMemory(api, patience),
        library=Library(of_device(api.device), force=order.kernels, device=api.device),
        native_bf16=api.native_bf16,
        kv_fraction=0.85,  # the rest is for activations
    )


_OPENERS: Mapping[str, Callable[[_Order], Device]] = {"cpu": _open_cpu, "cuda": _open_cuda}


def open_device(
    name: str, *, threads: int | None = None, clock: Clock | None = None, kernels: Mapping[str, str] | None = None
) -> Device:
    """Device by name: cpu, cuda (the first GPU, of AMD too) or cuda:N.

    `threads`: size of the compute team on a CPU, None = torch's own choice. `clock`: the system's unless given.
    `kernels`: operation -> implementation that is to be used instead of the chosen one.
    ConfigError for a name that is not in the table and for a GPU that cannot be used.
    """
    parts = re.fullmatch(r"(\w+)(?::(\d+))?", name)
    opener = None if parts is None else _OPENERS.get(parts[1])
    if parts is None or opener is None:
        raise ConfigError(
            f"no device {name!r} in this build; use one of: {', '.join(sorted(_OPENERS))}", param="device"
        )
    if threads is not None and threads < 1:
        raise ConfigError(f"a device needs at least one compute thread, got {threads}", param="threads")
    index = None if parts[2] is None else int(parts[2])
    return opener(_Order(index=index, threads=threads, clock=clock or SystemClock(), kernels=kernels or {}))
