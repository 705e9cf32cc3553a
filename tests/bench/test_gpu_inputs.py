"""Every large case can be made, for a device that is not here and without its memory."""

import dataclasses

import pytest
import torch

from baton_kernels.families import FAMILIES
from baton_kernels.registry import Call, Case, Traffic
from bench.gpu.inputs import MOST_SETS, ROTATION_BYTES, SizeUnknown, argument_bytes, held_bytes, make, sets, tensors

LARGE = [
    pytest.param(case, id=f"{family.op}-{case.name}") for family in FAMILIES for case in family.cases() if case.bench
]
MEMORY_BYTES = 130 << 30  # of the smallest GPU that the goals are for


@pytest.mark.parametrize("case", LARGE)
def test_a_large_case_fits_on_a_gpu_and_holds_what_its_model_moves(case):
    try:
        held = argument_bytes(case, torch.device("cuda"))
    except SizeUnknown as unknown:
        pytest.skip(f"looks at values while it is made, so the benchmark cannot ask whether it fits: {unknown}")
    assert held < MEMORY_BYTES
    assert case.traffic.bytes <= 4 * held, "the model counts more than each argument read twice and written twice"


@pytest.mark.parametrize("family", [pytest.param(family, id=family.op) for family in FAMILIES])
def test_names_of_cases_are_unique(family):
    names = [case.name for case in family.cases()]
    assert len(set(names)) == len(names)


def small_case(elements=8, traffic_bytes=64, reads=False):
    def draw(random, device):
        x = torch.randn(elements, generator=random)
        if reads:
            x = x[: max(1, int(x[0] > -9.0) * elements)].clone()
        return Call(arguments={"x": x, "view": x[:2], "n": 3}, outputs=("x",))

    traffic = Traffic(bytes=traffic_bytes, flops=0)
    return Case(name="small", shape=None, make=draw, traffic=traffic, bench=True)


def test_no_memory_is_taken_to_learn_a_size():
    assert argument_bytes(small_case(elements=1 << 40, traffic_bytes=1 << 42), torch.device("cuda")) == 4 << 40


def test_a_small_case_that_reads_its_values_is_made_to_learn_its_size():
    assert argument_bytes(small_case(reads=True), torch.device("cuda")) == 32


def test_a_large_case_that_reads_its_values_has_no_size_before():
    with pytest.raises(SizeUnknown):
        argument_bytes(small_case(reads=True, traffic_bytes=1 << 40), torch.device("cuda"))


def test_sets_differ_and_together_are_larger_than_any_cache():
    case, size = small_case(), ROTATION_BYTES // 3
    made = sets(case, torch.device("cpu"), size)
    assert len(made) == 4
    assert len({tuple(call.arguments["x"].tolist()) for call in made}) == 4
    assert len(sets(case, torch.device("cpu"), 1)) == MOST_SETS
    assert len(sets(case, torch.device("cpu"), ROTATION_BYTES * 5)) == 1


def test_the_same_seed_makes_the_same_inputs():
    first, second = (make(small_case(), torch.device("cpu"), 5).arguments["x"] for _ in range(2))
    assert torch.equal(first, second)


@dataclasses.dataclass
class Plan:
    table: torch.Tensor
    parts: tuple


def test_tensors_are_found_in_any_structure_and_storages_counted_once():
    x = torch.zeros(10)
    plan = Plan(table=x[2:4], parts=(torch.zeros(3), {"deep": torch.zeros(5)}, "text", None))
    assert len(list(tensors({"plan": plan, "x": x}))) == 4
    assert held_bytes({"plan": plan, "x": x}) == 4 * (10 + 3 + 5)
