"""Every Triton kernel under the interpreter, against its reference. Needs TRITON_INTERPRET=1 before Triton is imported:
`make kernels` runs this in a process of its own."""

import pytest
import torch
from support.kernel_cases import run_case

from baton_kernels.capabilities import named
from baton_kernels.families import FAMILIES
from baton_kernels.rt.language import INTERPRETED

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]
CASES = [
    pytest.param(family, case, id=f"{family.op}-{case.name}")
    for family in FAMILIES
    for case in family.cases()
    if not case.bench
]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_kernel_agrees_with_its_reference(family, case):
    run_case(family, case, named("sm_90"), torch.device("cpu"), force={family.op: "triton"})
