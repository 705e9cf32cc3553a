"""What this machine can do at best, measured in the run that is judged by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear


def best_s(call: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_tflops(dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """TFLOP/s of one size³ product."""
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / best_s(lambda: linear(left, right), repeats) / 1e12


def linear_gbps(shapes: Sequence[tuple[int, int]], batch: int, dtype: torch.dtype, repeats: int = 2) -> float:
    """GB/s at which `F.linear` streams weights of these (out, in) shapes, each read once per pass, at this batch."""
    weights = [torch.randn(out, into, dtype=torch.float32).to(dtype) for out, into in shapes]
    inputs = {into: torch.randn(batch, into, dtype=torch.float32).to(dtype) for _, into in shapes}
    size = sum(weight.numel() * weight.element_size() for weight in weights)

    def stream() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return size / best_s(stream, repeats) / 1e9


def memmove_gbps(size: int = 256 << 20, repeats: int = 5) -> float:
    """GB/s of one thread copying `size` bytes."""
    source, target = bytearray(size), bytearray(size)
    view = memoryview(target)

    def copy() -> None:
        view[:] = source

    return size / best_s(copy, repeats) / 1e9
