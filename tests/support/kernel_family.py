"""A family made up for tests: implementations that refuse, fail to compile or count, and no arithmetic."""

from dataclasses import dataclass

from baton_kernels.registry import Family, Implementation, anywhere


@dataclass(frozen=True)
class Size:
    label: str = "small"


class Bound:
    """An operation with these programs, and what it was bound with."""

    def __init__(self, name, config, programs=()):
        self.name, self.config, self.programs = name, config, tuple(programs)


class Fake:
    """Stands for a program; `compile` counts, and does what it is told."""

    def __init__(self, does=lambda: None):
        self.compiled, self._does = 0, does

    def compile(self):
        self.compiled += 1
        self._does()


def implementation(name, *programs, why="", optional=False, tunable=False):
    return Implementation(
        name=name,
        refuses=lambda _capabilities, _shape: why,
        bind=lambda _capabilities, _shape, config: Bound(name, config, programs),
        configs=(lambda _capabilities, _shape: []) if tunable else None,
        optional=optional,
    )


def family(*implementations, op="made_up"):
    """With a torch reference behind the implementations given."""
    reference = Implementation(name="torch", refuses=anywhere, bind=lambda _c, _s, config: Bound("torch", config))
    return Family(
        op=op, implementations=(*implementations, reference), shapes=lambda _capabilities: [Size()], cases=list
    )
