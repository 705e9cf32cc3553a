"""What this GPU can do at best, measured in the run that is judged by it; and the floor that follows for a call.

The floor is the larger of bytes over copy bandwidth and flops over the bf16 matrix rate: kernels compute in bf16, also
where their inputs are stored in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Traffic
from bench.gpu.card import Gpu
from bench.gpu.timing import measure

COPY_BYTES = 4 << 30  # of one buffer: far past every cache
MATRIX = 8192
_UNKNOWN_FLOOR_S = 1.0  # long enough to be timed without a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Measured."""

    copy_gbps: float  # read + written
    bf16_tflops: float  # on random data; zeros would be faster
    fp8_tflops: float | None = None

    def floor(self, traffic: Traffic) -> tuple[float, str]:
        """Seconds under which no version gets, and what limits it: mem or comp."""
        moving, computing = traffic.bytes / (self.copy_gbps * 1e9), traffic.flops / (self.bf16_tflops * 1e12)
        return (computing, "comp") if computing > moving else (moving, "mem")


def measure_ceilings(gpu: Gpu, capabilities: Capabilities, budget_s: float = 3.0) -> Ceilings:
    """Takes about `budget_s` for each of two or three measurements, and a quarter of the memory that is free."""
    return Ceilings(
        copy_gbps=_copy_gbps(gpu, budget_s),
        bf16_tflops=_tflops(gpu, _bf16_product(gpu.torch_device), budget_s),
        fp8_tflops=None if capabilities.fp8 is None else _fp8_tflops(gpu, capabilities.fp8, budget_s),
    )


def _copy_gbps(gpu: Gpu, budget_s: float) -> float:
    size = min(COPY_BYTES, gpu.free_bytes() // 8)
    source = torch.full((size,), 7, dtype=torch.uint8, device=gpu.torch_device)
    target = torch.empty_like(source)
    timing = measure(gpu, [lambda: target.copy_(source)], _UNKNOWN_FLOOR_S, budget_s)
    return 2 * size / timing.p50_s / 1e9


def _tflops(gpu: Gpu, product: Callable[[], object], budget_s: float) -> float:
    return 2 * MATRIX**3 / measure(gpu, [product], _UNKNOWN_FLOOR_S, budget_s).p50_s / 1e12


def _bf16_product(device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _fp8_tflops(gpu: Gpu, dtype: torch.dtype, budget_s: float) -> float | None:
    """None where this torch cannot multiply 8-bit floats on this device."""
    device = gpu.torch_device
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)
    try:
        return _tflops(
            gpu,
            lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
            budget_s,
        )
    except RuntimeError:
        return None
