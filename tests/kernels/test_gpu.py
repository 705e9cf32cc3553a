"""Every kernel on a real device: against float64, with random shapes and page tables, and inside a graph.

`make gpu`, or `python -m pytest -m gpu tests/kernels`. `--stress-s 300` draws random cases for longer.
`--gpu-device cpu` with TRITON_INTERPRET=1 runs the same tests under the interpreter.
"""

import random
import time

import pytest
import torch
from support.gpu_graphs import Allocations, check_capture
from support.host_gpu import HostGpu
from support.kernel_cases import run_case
from support.kernel_stress import endless

from baton_kernels.capabilities import named, of_device
from baton_kernels.families import FAMILIES
from baton_kernels.library import Library
from baton_kernels.rt.language import INTERPRETED
from bench.gpu.card import CudaGpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

REFERENCE_BYTES, REFERENCE_FLOPS = 128 << 20, 40e9  # of a case that float64 on a CPU computes in seconds
LONGEST_ROW = 3000 if not INTERPRETED else 90
SECONDS_PER_DRAW = 30.0  # a kernel that takes longer hangs


def parameters(large):
    """Every way to compute every case but the reference itself."""
    return [
        pytest.param(family, case, one, id=f"{family.op}-{case.name}-{one.name}")
        for family in FAMILIES
        for case in family.cases()
        for one in family.implementations[:-1]
        if case.bench == large
        and (not large or (case.traffic.bytes <= REFERENCE_BYTES and case.traffic.flops <= REFERENCE_FLOPS))
    ]


@pytest.fixture(scope="module")
def capabilities(gpu_device):
    return named("sm_90") if INTERPRETED else of_device(gpu_device)


@pytest.fixture(scope="module")
def gpu(gpu_device):
    return CudaGpu(gpu_device) if gpu_device.type == "cuda" else HostGpu()


def forced(family, implementation, capabilities, shape):
    """The choice of this implementation; skips with its reason where it refuses."""
    if why := implementation.refuses(capabilities, shape):
        pytest.skip(why)
    return {family.op: implementation.name}


@pytest.mark.parametrize(("family", "case", "implementation"), parameters(large=False))
def test_a_small_case_agrees_with_float64(family, case, implementation, capabilities, gpu_device):
    force = forced(family, implementation, capabilities, case.shape)
    run_case(family, case, capabilities, gpu_device, force=force)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize(("family", "case", "implementation"), parameters(large=True))
def test_a_large_case_agrees_with_float64(family, case, implementation, capabilities, gpu_device):
    force = forced(family, implementation, capabilities, case.shape)
    run_case(family, case, capabilities, gpu_device, force=force)


@pytest.mark.parametrize(("family", "case", "implementation"), parameters(large=False))
def test_a_call_with_outputs_given_can_be_captured(family, case, implementation, capabilities, gpu):
    force = forced(family, implementation, capabilities, case.shape)
    operation = Library(capabilities, force=force).bind(family, case.shape)
    call = case.make(torch.Generator().manual_seed(0), gpu.torch_device)
    check_capture(operation, call, gpu, Allocations(gpu.torch_device))


def test_random_cases_agree_with_float64(capabilities, gpu_device, request):
    seed = random.randrange(1 << 32)
    end_s = time.monotonic() + request.config.getoption("--stress-s")
    tried = 0
    for family, case, values in endless(random.Random(seed), LONGEST_ROW):
        chosen = family.implementations[0]
        if not chosen.refuses(capabilities, case.shape):
            began_s = time.monotonic()
            try:
                run_case(family, case, capabilities, gpu_device, force={family.op: chosen.name}, seed=values)
            except Exception as error:
                raise AssertionError(
                    f"case {tried} of seed {seed}: {family.op} {case.name}, values {values}"
                ) from error
            assert time.monotonic() - began_s < SECONDS_PER_DRAW, f"case {tried} of seed {seed} hung"
            tried += 1
        if time.monotonic() > end_s:
            break
    assert tried
