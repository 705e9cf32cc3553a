"""What the tests on a GPU rely on, shown without one: their checks find what they are for, and every case puts its
tensors where it is told."""

import random
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from support.gpu_graphs import check_capture
from support.host_gpu import HostGpu
from support.kernel_cases import on_host
from support.kernel_stress import endless
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from baton_kernels.capabilities import CPU
from baton_kernels.families import FAMILIES
from baton_kernels.registry import Call
from bench.gpu.inputs import tensors

SMALL = [
    pytest.param(family, case, id=f"{family.op}-{case.name}")
    for family in FAMILIES
    for case in family.cases()
    if not case.bench
]


def tensor_call():
    return Call(arguments={"x": torch.ones(4), "out": torch.zeros(4)}, outputs=("out",))


# ---- graphs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "case"), SMALL)
def test_every_reference_computes_the_same_again_from_the_same_beginning(family, case):
    operation = family.reference.bind(CPU, case.shape, {})
    check_capture(operation, case.make(torch.Generator().manual_seed(0), torch.device("cpu")), HostGpu(), lambda: 0)


def test_an_operation_that_allocates_is_found():
    count = iter(range(100))
    with pytest.raises(AssertionError, match="allocates"):
        check_capture(lambda x, out: out.copy_(x), tensor_call(), HostGpu(), lambda: next(count))


def test_an_operation_that_looks_at_what_it_should_only_write_is_found():
    calls = []

    def adds_what_it_finds(x, out):
        calls.append(1)
        out.copy_(x + len(calls))

    with pytest.raises(AssertionError, match="a replay is not what a plain call computes"):
        check_capture(adds_what_it_finds, tensor_call(), HostGpu(), lambda: 0)


def test_a_graph_that_does_nothing_is_found():
    class Deaf(HostGpu):
        def record(self, calls):
            return lambda: None

    with pytest.raises(AssertionError, match="a replay is not what a plain call computes"):
        check_capture(lambda x, out: out.copy_(x), tensor_call(), Deaf(), lambda: 0)


# ---- devices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "case"), SMALL)
def test_every_tensor_of_a_case_lies_on_the_device_asked_for(family, case):
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            call = case.make(torch.Generator().manual_seed(0), torch.device("cuda"))
        except (DataDependentOutputException, RuntimeError):
            pytest.skip("looks at values while it is made: only a device can show it")
    assert {tensor.device.type for tensor in tensors(call.arguments)} <= {"cuda"}


@dataclass(frozen=True)
class Rows:
    table: torch.Tensor
    counts: tuple


def test_the_reference_gets_all_tensors_in_host_memory_however_deep_they_are():
    with FakeTensorMode():
        there = torch.empty(3, device="cuda")
        moved = on_host({"rows": Rows(table=there, counts=(1, 2)), "list": [there, None], "text": "cuda"})
        assert {tensor.device.type for tensor in tensors(moved)} == {"cpu"}
    assert moved["rows"].counts == (1, 2)
    assert moved["list"][1] is None
    assert moved["text"] == "cuda"


def test_a_structure_without_tensors_stays_itself():
    value = (1, {"a": "b"})
    assert on_host(value) == value


# ---- random cases ---------------------------------------------------------------------------------------------------
def drawn(seed, count):
    return [(family.op, case.name, values) for family, case, values in islice(endless(random.Random(seed), 200), count)]


def test_random_cases_follow_from_their_seed_and_take_the_families_in_turn():
    count = 3 * len(FAMILIES)
    assert drawn(1, count) == drawn(1, count) != drawn(2, count)
    assert [op for op, _, _ in drawn(1, count)] == [family.op for family in FAMILIES] * 3


def test_invented_shapes_are_new_every_time_and_small_enough():
    names = {name for op, name, _ in drawn(3, 40 * len(FAMILIES)) if op in ("attention", "pages")}
    assert len(names) > 70
