"""Stand-ins for a GPU of the benchmarks: one that really computes, on the host, and one whose time is scripted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

HERE = torch.device("cpu")


@dataclass
class HostGpu:
    """A Gpu whose device is the CPU; a graph of it is a list of calls."""

    torch_device: torch.device = HERE
    free: int = 64 << 30

    def laps(self, call, count):
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    def launch_s(self, call, count):
        return sum(self.laps(call, count)) / count

    def record(self, calls):
        return lambda: [call() for call in calls]

    def free_bytes(self):
        return self.free


@dataclass
class ScriptedGpu:
    """A Gpu on which each call takes as long as the call itself says, in the order asked for."""

    torch_device: torch.device = HERE
    now_s: float = 0.0
    recorded: list[int] = field(default_factory=list)  # calls of each graph
    refuses_graphs: str = ""

    def clock(self):
        return self.now_s

    def laps(self, call, count):
        found = [float(call()) for _ in range(count)]
        self.now_s += sum(found)
        return found

    def launch_s(self, call, count):
        return 5e-6

    def record(self, calls):
        if self.refuses_graphs:
            raise RuntimeError(self.refuses_graphs)
        self.recorded.append(len(calls))
        return lambda: sum(call() for call in calls)

    def free_bytes(self):
        return 1 << 40
