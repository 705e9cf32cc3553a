"""What a family of kernels tells about itself: its implementations in order of preference, its test cases, its floor.

A family is one operation. Its file holds, in this order: the torch reference (the specification and the CPU path),
the Triton kernels, the operation that launches them, `model` (bytes and flops of a call) and `cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.program import Config, Program


class Shape(Protocol):
    """Frozen dataclass of everything that a kernel is compiled for."""

    @property
    def label(self) -> str:
        """Shape class: names a row of the configuration table and one line of `baton explain kernels`."""


class Operation(Protocol):
    """A bound operation. Calls take preallocated outputs, neither allocate nor wait, and may be captured in a graph
    (the torch reference may do all of that)."""

    @property
    def programs(self) -> Sequence[Program]:
        """All that it may launch."""


S = TypeVar("S", bound=Shape)
O = TypeVar("O", bound=Operation)  # noqa: E741


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation(Generic[S, O]):
    """One way to compute a family's operation."""

    name: str
    refuses: Callable[[Capabilities, S], str]  # why it cannot, in a clause; "" = it can
    bind: Callable[[Capabilities, S, Config], O]  # cheap: compiles nothing
    configs: Callable[[Capabilities, S], Sequence[Config]] | None = None  # candidates of a sweep; None = not tunable
    optional: bool = False  # only where it is preferred by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one call must at least do."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Arguments of one call and what to compare afterwards."""

    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]  # tensor arguments that are written: compared after the call
    updated: tuple[str, ...] = ()  # outputs that are also read; the others are poisoned before
    units_last_place: tuple[str, ...] = ()  # outputs of 8-bit codes: may be off by one unit in the last place
    exact: tuple[str, ...] = ()  # outputs that must be equal: integers, digests, copies
    precision: torch.dtype = torch.float32  # coarsest rounding on the way to any output


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(Generic[S]):
    """One input of a family; small enough for the interpreter unless `bench`."""

    name: str
    shape: S
    make: Callable[[torch.Generator, torch.device], Call]
    traffic: Traffic
    bench: bool = False  # too large for the interpreter; measured on a GPU
    goal: float | None = None  # fraction of the floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[S, O]):
    """One operation, as the oracle, the tests and the benchmark see it."""

    op: str
    implementations: tuple[Implementation[S, O], ...]  # fastest first, the torch reference last
    shapes: Callable[[Capabilities], Sequence[S]]  # compiled ahead of time in CI
    cases: Callable[[], Sequence[Case[S]]]
    expects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of a program, or of a kernel for all its programs -> kinds of instruction that its code must contain:
    "matrix" (any), "widest matrix" (wgmma, tcgen05, mfma: the device's `matrix`), "descriptor" (a bulk copy, where the
    device has it), "wide load" (16 bytes or more at a time)."""

    def expected(self, program: Program) -> tuple[str, ...]:
        """Kinds of instruction that the code of this program must contain."""
        return self.expects.get(program.name, self.expects.get(program.kernel_name, ()))

    @property
    def reference(self) -> Implementation[S, O]:
        return self.implementations[-1]


def anywhere(_capabilities: Capabilities, _shape: object) -> str:
    """`refuses` of a torch reference."""
    return ""


def like_kernel(refuses: Callable[[Capabilities, S], str]) -> Callable[[Capabilities, S], str]:
    """`refuses` of a reference that is no choice on a GPU but where a kernel should run and does not compile: what the
    kernel refuses is refused, with its reason, before weights are read."""

    def answer(capabilities: Capabilities, shape: S) -> str:
        if capabilities.vendor == "cpu" or not refuses(capabilities, shape):
            return ""
        return "on a GPU only in place of a kernel that does not compile"

    return answer


def needs_triton(capabilities: Capabilities) -> str:
    """First half of every Triton implementation's `refuses`."""
    if capabilities.vendor == "cpu":
        return "a CPU runs the torch reference"
    if capabilities.triton is None:
        return "Triton is not installed"
    if capabilities.triton < (3, 6):
        return f"Triton {'.'.join(map(str, capabilities.triton))} is older than 3.6"
    return ""
