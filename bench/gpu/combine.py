"""Candidates of a sweep as a grid: which fields are varied together, and what the winners of each group give together.

A family with several kernels cannot try every combination of their tiles. It varies the fields of one kernel at a time,
the others at a middle setting; a kernel's best tiles do not depend on another's, so the winners can be joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from baton_kernels.rt.program import Config


def combined(costs: Sequence[tuple[Config, float]]) -> Config | None:
    """The cheapest candidate of each group of fields, joined. None where there is one group: the cheapest itself is it.

    `costs`: candidates of one grid, all with the same fields, each with what it costs.
    """
    if not costs:
        return None
    middle = _middle([config for config, _ in costs])
    moved = [(_moved(config, middle), cost) for config, cost in costs]
    groups = _groups([set(fields) for fields, _ in moved])
    if len(groups) < 2:
        return None
    joined = dict(middle)
    for group in groups:
        best, _ = min(((fields, cost) for fields, cost in moved if set(fields) <= group), key=lambda one: one[1])
        joined |= best
    return joined


def _middle(candidates: Sequence[Config]) -> Config:
    """Each field's most frequent value."""
    return {name: Counter(config[name] for config in candidates).most_common(1)[0][0] for name in candidates[0]}


def _moved(config: Config, middle: Config) -> Mapping[str, int]:
    return {name: value for name, value in config.items() if value != middle[name]}


def _groups(sets: Sequence[set[str]]) -> list[set[str]]:
    """Fields that some candidate varies together, directly or through others."""
    groups: list[set[str]] = []
    for fields in filter(None, sets):
        touching = [group for group in groups if group & fields]
        groups = [group for group in groups if not group & fields]
        groups.append(set(fields).union(*touching))
    return groups
