"""The GPU under test: its clock, its graphs, and what a reader must know of it to judge a figure.

`Gpu` is all that the measuring code needs of a device, so that it can be tested without one.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch

from bench.report import provenance

Call = Callable[[], object]


class Gpu(Protocol):
    """A device that runs calls in order."""

    @property
    def torch_device(self) -> torch.device: ...

    def laps(self, call: Call, count: int) -> list[float]:
        """Seconds of each of `count` calls that were queued back to back, by the device's clock."""

    def launch_s(self, call: Call, count: int) -> float:
        """Seconds of host time per call, while the device is kept busy by others."""

    def record(self, calls: Sequence[Call]) -> Call:
        """A graph of these calls, in order; the result replays it. Raises what the driver says of a call that cannot be
        recorded."""

    def free_bytes(self) -> int:
        """After everything that nobody holds went back to the driver."""


class CudaGpu:
    """torch.cuda as a Gpu; NVIDIA's or AMD's."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        torch.cuda.set_device(torch_device)
        self._side = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]

    def laps(self, call: Call, count: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        marks[-1].synchronize()
        return [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]

    def launch_s(self, call: Call, count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        return spent / count

    def record(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self._side):
            for call in calls:
                call()
        return graph.replay

    def free_bytes(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.torch_device)[0])


def about(device: torch.device) -> dict[str, object]:
    """Provenance of a run: the device, its driver, torch and Triton, the commit, the time."""
    found = provenance() | {"torch": torch.__version__, "triton": triton_version()}
    if device.type != "cuda":
        return found | {"device": device.type}
    card = torch.cuda.get_device_properties(device)
    return found | {
        "device": card.name,
        "architecture": f"sm_{card.major}{card.minor}" if torch.version.hip is None else card.gcnArchName,
        "units": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": card.L2_cache_size,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def triton_version() -> str:
    try:
        import triton  # noqa: PLC0415 - absent where torch has no GPU support
    except ImportError:
        return ""
    return str(triton.__version__)


def driver_version() -> str:
    """As the vendor's tool says, empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.split()
    return said[0] if said else ""
