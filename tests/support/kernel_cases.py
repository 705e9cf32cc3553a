"""Runs a kernel family's case on an implementation and judges the outcome against the float64 reference."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import torch

from baton_kernels.capabilities import CPU, Capabilities
from baton_kernels.library import Library

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-5}
"""Of the norm of the difference over the norm of the reference; one element may be off by five times as much, measured
against the largest one."""
CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def run_case(family, case, capabilities: Capabilities, device: torch.device, *, force=None, seed=0):
    """Bind, poison the outputs, run, compare. Raises AssertionError with what differs."""
    operation = Library(capabilities, force=force).bind(family, case.shape)
    call = case.make(torch.Generator().manual_seed(seed), device)
    expected = reference(family, case, call)
    arguments = dict(call.arguments)
    for name in call.outputs:
        poison(arguments[name], call, name, before=call.arguments[name])
    operation(**arguments)
    for name in call.outputs:
        judge(name, arguments[name], expected[name], call)


def reference(family, case, call):
    """Outputs of the torch reference on the same arguments, floats as float64 on the CPU."""
    arguments = {name: widened(value) for name, value in call.arguments.items()}
    shape = case.shape
    if hasattr(shape, "dtype"):
        shape = replace(shape, dtype=torch.float64 if shape.dtype.is_floating_point else shape.dtype)
    family.reference.bind(CPU, shape, {})(**arguments)
    return {name: arguments[name] for name in call.outputs}


def widened(value):
    if not isinstance(value, torch.Tensor):
        return on_host(value)
    value = value.detach().cpu().clone(memory_format=torch.preserve_format)
    return value.double() if value.dtype in (torch.float32, torch.float16, torch.bfloat16) else value


def on_host(value):
    """A structure with its tensors in host memory; what has none stays what it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(on_host(item) for item in value)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        moved = {name: on_host(item) for name, item in held.items()}
        return replace(value, **moved) if any(moved[name] is not held[name] for name in held) else value
    return value


def poison(tensor, call, name, *, before):
    """What is only written becomes NaN, so that an element left out shows; what is also read stays."""
    if name in call.updated:
        return
    if tensor.dtype in CODES:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(-77)


def judge(name, got, want, call):
    got = got.detach().cpu()
    if name in call.exact:
        torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0, msg=lambda text: f"{name}: {text}")
        return
    if name in call.units_last_place:
        assert got.dtype in (*CODES, torch.int8), f"{name} has no 8-bit codes"
        assert not torch.isnan(got.float()).any(), f"{name} has elements that were not written"
        want = want.to(got.dtype)
        steps = (ordered(got) - ordered(want)).abs()
        # A sum that nearly cancels carries the rounding of its addends: many tiny steps near zero, none elsewhere.
        tiny = (got.double() - want.double()).abs() <= 2**-7 * want.double().abs().max() if got.numel() else steps == 0
        assert torch.all((steps <= 1) | tiny), f"{name} is off by {steps[~tiny].max()} units in the last place"
        return
    assert not torch.isnan(got.double()).any(), f"{name} has NaN, or elements that were not written"
    if not got.numel():
        return
    limit = max(TOLERANCE[got.dtype], TOLERANCE[call.precision])
    # Infinities (the log-sum-exp of nothing) must agree; the rest is compared.
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{name} has infinities elsewhere than the reference"
    got, want = got.double()[finite], want.double()[finite]
    if not got.numel():
        return
    error, size = (got - want), want.norm().clamp(min=1e-12)
    assert error.norm() / size <= limit, f"{name}: relative error {error.norm() / size:.2e}, allowed {limit:.0e}"
    worst = error.abs().max() / want.abs().max().clamp(min=1e-12)
    assert worst <= 5 * limit, f"{name}: one element is off by {worst:.2e} of the largest, allowed {5 * limit:.0e}"


def ordered(codes):
    """8-bit codes as integers in order of value, so that neighbours differ by one."""
    if codes.dtype is torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)
