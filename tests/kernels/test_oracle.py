"""Which implementation runs where, and why: rules on families made up for the purpose, then the real ones' tables."""

from dataclasses import replace

import pytest
import torch
from support.kernel_family import Size, family, implementation
from support.tool import tool

from baton_kernels import configs
from baton_kernels.capabilities import CPU, NAMED, named
from baton_kernels.families import FAMILIES
from baton_kernels.norm import FAMILY as NORM
from baton_kernels.norm import NormShape
from baton_kernels.oracle import Unsupported, choices

HOPPER = named("sm_90")
CHOSEN = tool("kernel_choices")


# ---- rules ----------------------------------------------------------------------------------------------------------
def test_choices_are_in_order_of_preference_and_the_reference_is_the_last():
    found = choices(family(implementation("gluon"), implementation("triton")), HOPPER, Size())
    assert [choice.implementation for choice in found] == ["gluon", "triton", "torch"]
    assert [choice.slow for choice in found] == [False, False, True]


def test_a_reason_holds_what_refused_before():
    found = choices(family(implementation("gluon", why="no sinks"), implementation("triton")), HOPPER, Size())
    assert [(choice.implementation, choice.reason) for choice in found] == [
        ("triton", "gluon: no sinks; fixed"),
        ("torch", "gluon: no sinks; fixed"),
    ]


def test_on_a_cpu_the_reference_is_not_slow():
    (only,) = choices(family(implementation("triton", why="a CPU")), CPU, Size())
    assert not only.slow


def test_a_tunable_implementation_gets_its_row_and_says_where_that_was_found(monkeypatch):
    table = {"family": "hopper", "triton": "3.7", "how": "compiled, not timed", "rows": {"default": {"BLOCK": 64}}}
    monkeypatch.setattr(configs, "_tables", lambda _op: [table])
    best = choices(family(implementation("triton", tunable=True)), named("sm_80"), Size())[0]
    assert best.config == {"BLOCK": 64}
    assert best.reason == "no table for ampere; borrowed from hopper, Triton 3.7, row default: compiled, not timed"


def test_what_is_optional_runs_only_where_it_is_asked_for_by_name():
    both = family(implementation("flashinfer", optional=True), implementation("triton"))
    assert choices(both, HOPPER, Size())[0].implementation == "triton"
    (only,) = choices(both, HOPPER, Size(), {"made_up": "flashinfer"})
    assert (only.implementation, only.reason) == ("flashinfer", "asked for by name; fixed")


def test_what_is_asked_for_by_name_and_cannot_run_is_refused_with_its_reason():
    with pytest.raises(Unsupported, match="made_up small cannot run on sm_90: triton: heads of 80 elements"):
        choices(family(implementation("triton", why="heads of 80 elements")), HOPPER, Size(), {"made_up": "triton"})


def test_an_implementation_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(Unsupported, match="made_up has no implementation 'cutlass'; there are triton, torch"):
        choices(family(implementation("triton")), HOPPER, Size(), {"made_up": "cutlass"})


def test_when_all_refuse_every_reason_is_said():
    one = family(implementation("gluon", why="no sinks"), implementation("triton", why="no window"))
    without_reference = replace(one, implementations=one.implementations[:2])
    with pytest.raises(Unsupported, match="gluon: no sinks; triton: no window"):
        choices(without_reference, HOPPER, Size())


# ---- the families that there are ------------------------------------------------------------------------------------
EVERY = [pytest.param(family, id=family.op) for family in FAMILIES]


def test_an_operation_has_one_family():
    assert len({family.op for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("family", EVERY)
def test_a_cpu_runs_the_reference_of_every_shape_and_nothing_else(family):
    for shape in CHOSEN.every_shape(family):
        (only,) = choices(family, CPU, shape)
        assert only.implementation == family.reference.name
        assert not only.slow


@pytest.mark.parametrize("name", [name for name in NAMED if name != "cpu"])
@pytest.mark.parametrize("family", EVERY)
def test_a_gpu_never_runs_the_reference_of_a_shape_that_is_compiled_ahead_for_it(family, name):
    for shape in family.shapes(named(name)):
        best = choices(family, named(name), shape)[0]
        assert not best.slow, f"{shape.label}: {best.reason}"


ONLY_KERNELS = ("attention", "mla")  # a reference that reads page tables on the host is no way to serve


@pytest.mark.parametrize(
    ("triton", "why"), [(None, "Triton is not installed"), ((3, 5), "Triton 3.5 is older than 3.6")]
)
@pytest.mark.parametrize("family", EVERY)
def test_without_a_triton_that_is_supported_a_gpu_falls_back_or_refuses_and_says_why(family, triton, why):
    for shape in family.shapes(HOPPER):
        if family.op in ONLY_KERNELS:
            with pytest.raises(Unsupported, match=why):
                choices(family, replace(HOPPER, triton=triton), shape)
            continue
        best = choices(family, replace(HOPPER, triton=triton), shape)[0]
        assert best.slow
        assert why in best.reason


@pytest.mark.parametrize("name", ["sm_80", "sm_86"])
def test_a_device_without_8_bit_floats_refuses_to_make_them(name):
    best = choices(NORM, named(name), NormShape(width=4096, dtype=torch.bfloat16, quantised=True))[0]
    assert best.implementation == "torch"
    assert f"triton: {name} has no 8-bit floats" in best.reason


@pytest.mark.parametrize("name", NAMED)
def test_the_table_of_each_device_is_the_committed_one(name):
    committed = (CHOSEN.TABLES / f"{name}.txt").read_text()
    assert CHOSEN.table(named(name)) == committed, "if it is meant: tools/kernel_choices.py --write"
