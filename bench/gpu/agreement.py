"""Whether two configurations of a kernel compute the same. The shipped one is what the tests compare with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baton_kernels.registry import Call, Case
from baton_kernels.rt.program import Config
from bench.gpu.inputs import make

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the norm of the difference over the norm: two roundings of the same sum in another order."""
CODES_ALLOWED = 2e-2  # 8-bit codes: some are one step apart

Bind = Callable[[Any, Config], Any]


def disagreement(case: Case[Any], bind: Bind, shipped: Config, other: Config, device: torch.device) -> str:
    """Run both on equal inputs, outputs poisoned before. Empty when they agree, else what differs."""
    first, second = (_outputs(case, bind(case.shape, config), device) for config in (shipped, other))
    call = first[0]
    for name in call.outputs:
        if why := _differs(first[1][name], second[1][name], call, name):
            return f"{name} {why}"
    return ""


def _outputs(case: Case[Any], operation: Any, device: torch.device) -> tuple[Call, dict[str, Tensor]]:
    call = make(case, device, 0)
    for name in call.outputs:
        if name not in call.updated and call.arguments[name].dtype.is_floating_point:
            call.arguments[name].fill_(float("nan"))
    operation(**call.arguments)
    return call, {name: call.arguments[name] for name in call.outputs}


def _differs(want: Tensor, got: Tensor, call: Call, name: str) -> str:
    if name in call.exact:
        return "" if torch.equal(want, got) else "is not equal"
    limit = CODES_ALLOWED if name in call.units_last_place else max(ALLOWED[call.precision], ALLOWED[torch.float32])
    finite = torch.isfinite(want.float())
    if not torch.equal(finite, torch.isfinite(got.float())) or torch.isnan(got.float()).any():
        return "has other infinities, or elements that were not written"
    expected = want.double()[finite]
    error = (got.double()[finite] - expected).norm() / expected.norm().clamp(min=1e-12)
    return "" if error <= limit else f"differs by {error:.1e} of its norm, allowed {limit:.0e}"
