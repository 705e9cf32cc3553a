"""The kernels of one device: asks the oracle, compiles what it chose, holds what it compiled.

A kernel that the installed Triton cannot compile costs a warning, a count and the next implementation, at `bind`, never
in the middle of serving. One log line per operation and shape class. It does not know models.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from baton_kernels import oracle
from baton_kernels.capabilities import Capabilities
from baton_kernels.oracle import Choice, Unsupported
from baton_kernels.registry import Family, O, S
from baton_kernels.rt.program import CompileFailed, Program

log = logging.getLogger("baton.kernels")


class Library:
    """Binds operations for one device. Thread-safe; `bind` may compile and then takes seconds."""

    def __init__(
        self, capabilities: Capabilities, *, force: Mapping[str, str] | None = None, device: torch.device | None = None
    ) -> None:
        """`force`: operation -> implementation. `device`: the GPU that is to run it, where compiled code is loaded at
        once; None where nothing is launched, or only under the interpreter."""
        self.capabilities = capabilities
        self._device = device
        self._force = dict(force or {})
        self._lock = threading.Lock()
        self._bound: dict[tuple[str, object], Any] = {}
        self._choices: tuple[Choice, ...] = ()  # replaced, not changed: who reads does not wait for a compiler
        self._fallbacks: Mapping[tuple[str, str], int] = {}

    def bind(self, family: Family[S, O], shape: S) -> O:
        """The operation for this shape, compiled. Unsupported, with every reason, when nothing can run."""
        with self._lock:
            held: O | None = self._bound.get((family.op, shape))
            if held is None:
                held = self._bound[family.op, shape] = self._first_that_compiles(family, shape)
            return held

    @property
    def choices(self) -> Sequence[Choice]:
        """What was bound so far, in order."""
        return self._choices

    @property
    def fallbacks(self) -> Mapping[tuple[str, str], int]:
        """(operation, implementation that runs) -> how often it is a slow path, or stands in for one that does not
        compile; 0 where all is as planned."""
        return self._fallbacks

    def _first_that_compiles(self, family: Family[S, O], shape: S) -> O:
        failed: list[str] = []
        for choice in oracle.choices(family, self.capabilities, shape, self._force):
            chosen = next(one for one in family.implementations if one.name == choice.implementation)
            operation = chosen.bind(self.capabilities, shape, choice.config)
            try:
                self._make_ready(operation.programs)
            except CompileFailed as error:
                failed.append(f"{chosen.name}: {error}")
                log.warning("a kernel does not compile", extra={"op": family.op, "why": str(error)})
                continue
            choice = replace(choice, reason="; ".join([*failed, choice.reason]))
            self._choices = (*self._choices, choice)
            key = (family.op, chosen.name)
            counted = self._fallbacks.get(key, 0) + bool(choice.slow or failed)
            self._fallbacks = {**self._fallbacks, key: counted}  # from zero on, so that a metric of it is always there
            say = log.warning if choice.slow else log.debug
            said = {"op": family.op, "shape": choice.label, "with": chosen.name, "why": choice.reason}
            say("kernel chosen", extra=said)
            return operation
        raise Unsupported(
            f"{family.op} {shape.label} does not compile for {self.capabilities.name}: {'; '.join(failed)}",
            param="kernels",
        )

    def _make_ready(self, programs: Sequence[Program]) -> None:
        if self._device is None:
            for program in programs:
                program.compile()
            return
        with torch.cuda.device(self._device):
            for program in programs:
                program.load()
