"""Cross-field rules: written once, beside the fields, as CEL for the API server and as Python for everything offline.

A rule is a method of a model that returns True when all is well, under `@rule(cel=..., message=...)`. The generated CRD
carries the CEL, `violations` runs the method; a table test asks both for every rule. A message says what to do. Its
`{path.to.field}` parts are filled with strings of bounded length on both sides; CEL's string() has no bound, so numbers
cannot be shown. Knows no model and no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from pydantic.alias_generators import to_snake

M = TypeVar("M", bound=BaseModel)
_VALUE = re.compile(r"\{([\w.]+)\}")


class Place(StrEnum):
    """Where a service is to run: not every rule of a cluster holds on one machine, nor the other way round."""

    CLUSTER = "cluster"
    MACHINE = "machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Generic[M]):
    """One rule of model M. `field` is the part of M that is at fault, dotted; empty = M itself."""

    name: str
    message: str
    check: Callable[[M], bool] | None = None
    transition: Callable[[M, M], bool] | None = None  # (new, old); only an update can break it
    cel: str = ""  # empty only for rules of Place.MACHINE
    field: str = ""
    places: frozenset[Place] = frozenset(Place)

    @property
    def in_crd(self) -> bool:
        return Place.CLUSTER in self.places

    def as_validation(self) -> dict[str, str]:
        """The entry of `x-kubernetes-validations`."""
        plain = _VALUE.sub(lambda found: f"<{found[1]}>", self.message)
        entry = {"rule": self.cel, "message": plain}
        if plain != self.message:
            entry["messageExpression"] = _expression(self.message)
        if self.field:
            entry["fieldPath"] = "." + self.field
        return entry

    def text(self, model: M) -> str:
        """The message as the API server would write it for this object."""
        return _VALUE.sub(lambda found: str(_look_up(model, found[1])), self.message)


def rule(
    *, message: str, cel: str = "", field: str = "", places: frozenset[Place] = frozenset(Place)
) -> Callable[[Callable[[M], bool]], Rule[M]]:
    """Makes a method of a model a rule; `self` in CEL is the model."""

    def made(check: Callable[[M], bool]) -> Rule[M]:
        return Rule(name=check.__name__, message=message, check=check, cel=cel, field=field, places=places)

    return made


def transition(*, cel: str, message: str, field: str = "") -> Callable[[Callable[[M, M], bool]], Rule[M]]:
    """The same for a rule about a change: the method gets the new object as `self` and the old one."""

    def made(check: Callable[[M, M], bool]) -> Rule[M]:
        return Rule(name=check.__name__, message=message, transition=check, cel=cel, field=field)

    return made


def rules_of(model: type[BaseModel]) -> list[Rule[Any]]:
    """Rules of a class in the order in which they are written, those of its bases first."""
    return [item for base in reversed(model.__mro__) for item in vars(base).values() if isinstance(item, Rule)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken rule. `path` leads from the checked object to the fault, `of` to the model whose rule it is."""

    path: tuple[int | str, ...]  # in names as written in YAML
    of: tuple[int | str, ...]
    rule: str
    message: str


def violations(model: BaseModel, place: Place, *, old: BaseModel | None = None) -> list[Violation]:
    """Every broken rule in an object and below it; with `old`, of the change from it too."""
    return list(_walk(model, old, place, ()))


def _walk(model: BaseModel, old: BaseModel | None, place: Place, path: tuple[int | str, ...]) -> Iterator[Violation]:
    for item in rules_of(type(model)):
        if place not in item.places:
            continue
        kept = item.check(model) if item.check else True
        if item.transition and old is not None:
            kept = item.transition(model, old)
        if not kept:
            where = (*path, *(item.field.split(".") if item.field else ()))
            yield Violation(path=where, of=path, rule=item.name, message=item.text(model))
    for name, info in type(model).model_fields.items():
        before = getattr(old, name, None)
        for key, child in _children(getattr(model, name)):
            counterpart = dict(_children(before)).get(key)
            yield from _walk(child, counterpart, place, (*path, info.alias or name, *key))


def _children(value: object) -> Iterator[tuple[tuple[int | str, ...], BaseModel]]:
    """Models in a field: itself, or the items of a list or a map."""
    if isinstance(value, BaseModel):
        yield (), value
    elif isinstance(value, Mapping):
        yield from (((str(key),), item) for key, item in value.items() if isinstance(item, BaseModel))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from (((index,), item) for index, item in enumerate(value) if isinstance(item, BaseModel))


def _expression(message: str) -> str:
    """CEL that builds the message."""
    parts: list[str] = []
    for index, part in enumerate(_VALUE.split(message)):
        if index % 2:
            parts.append(f"self.{part}")
        elif part:
            parts.append("'" + part.replace("\\", "\\\\").replace("'", "\\'") + "'")
    return " + ".join(parts)


def _look_up(model: BaseModel, path: str) -> object:
    value: object = model
    for part in path.split("."):
        value = getattr(value, to_snake(part))
    return value
