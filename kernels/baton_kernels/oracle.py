"""Which implementation runs where, and why: a pure function of (operation, capabilities, shape, what was asked for).

It reads tables and asks implementations; it compiles nothing and touches no device, so every answer can be printed and
tested anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton_common.errors import ConfigError
from baton_kernels import configs
from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Family, Shape
from baton_kernels.rt.program import Config


class Unsupported(ConfigError):
    """No implementation can do this on this device; the message has each one's reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One implementation that could run, best first."""

    op: str
    label: str
    implementation: str
    config: Config
    reason: str
    slow: bool  # the torch reference on a GPU: right, and many times slower


def choices(
    family: Family[Any, Any], capabilities: Capabilities, shape: Shape, force: Mapping[str, str] | None = None
) -> tuple[Choice, ...]:
    """All that can run, in the order in which to try them. `force`: operation -> implementation.

    Unsupported when there is none, or when the forced one cannot.
    """
    forced = (force or {}).get(family.op)
    if forced is not None and forced not in {one.name for one in family.implementations}:
        names = ", ".join(one.name for one in family.implementations)
        raise Unsupported(f"{family.op} has no implementation {forced!r}; there are {names}", param="kernels")
    found: list[Choice] = []
    refused: list[str] = []
    for one in family.implementations:
        if (one.name != forced) if forced is not None else one.optional:
            continue
        why = one.refuses(capabilities, shape)
        if why:
            refused.append(f"{one.name}: {why}")
            continue
        row = configs.find(family.op, capabilities, shape.label) if one.configs is not None else None
        reasons = ["asked for by name"] if forced is not None else refused[:]
        reasons.append(row.source if row is not None else "fixed")
        found.append(
            Choice(
                op=family.op,
                label=shape.label,
                implementation=one.name,
                config=row.config if row is not None else {},
                reason="; ".join(reasons),
                slow=one is family.reference and capabilities.vendor != "cpu",
            )
        )
    if not found:
        raise Unsupported(
            f"{family.op} {shape.label} cannot run on {capabilities.name}: {'; '.join(refused)}", param="kernels"
        )
    return tuple(found)
