"""Reads InferenceServices from YAML and says, of every fault, which line it is on.

Invariant: all faults of a document are reported, not only the first, in the words of the API server's rules. YAML's
silent traps are faults here too: a key that is written twice (the last would win), and anything but one document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml
from pydantic import ValidationError

from baton_common.errors import BatonError, ErrorKind
from baton_operator.api import InferenceService, Place, violations

Location: TypeAlias = tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong. `path` is dotted, as in `spec.model.uri`; lines count from 1."""

    line: int
    path: str
    message: str


class InvalidDocument(BatonError):
    """The document cannot be used; `faults` is never empty. `str()` has one line per fault, like a compiler's."""

    kind = ErrorKind.INVALID

    def __init__(self, name: str, faults: list[Fault]) -> None:
        lines = [f"{name}:{fault.line}: {fault.path + ': ' if fault.path else ''}{fault.message}" for fault in faults]
        super().__init__("\n".join(lines))
        self.faults = faults


def read_service(file: Path, *, place: Place = Place.MACHINE) -> InferenceService:
    """The one InferenceService in `file`, for `place`. Raises InvalidDocument, also when the file cannot be read."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidDocument(str(file), [Fault(line=1, path="", message=f"cannot be read: {reason}")]) from None
    return parse_service(text, name=str(file), place=place)


def parse_service(text: str, *, name: str = "service.yaml", place: Place = Place.MACHINE) -> InferenceService:
    """The one InferenceService in `text`; `name` stands before each fault. Raises InvalidDocument."""
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidDocument(name, [Fault(line=line, path="", message=f"not YAML: {error.problem}")]) from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise InvalidDocument(name, [Fault(line=1, path="", message=f"not YAML: {message}")]) from None
    if len(documents) != 1:
        line = documents[1].start_mark.line + 1 if documents else 1
        message = f"{len(documents)} documents; write exactly one InferenceService"
        raise InvalidDocument(name, [Fault(line=line, path="", message=message)])
    root = documents[0]
    if not isinstance(root, yaml.MappingNode):
        raise InvalidDocument(name, [Fault(line=root.start_mark.line + 1, path="", message="not a mapping")])
    if traps := list(_traps(root, ())):
        raise InvalidDocument(name, traps)
    try:
        written = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # well-formed, but a value cannot be made: a strange tag, a month 13
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidDocument(name, [Fault(line=line, path="", message=f"not usable YAML: {error.problem}")]) from None
    except ValueError as error:
        raise InvalidDocument(name, [Fault(line=1, path="", message=f"not usable YAML: {error}")]) from None
    try:
        return InferenceService.parse(written, place=place)
    except ValidationError as error:
        raise InvalidDocument(name, _faults(root, written, error, place)) from None


def _faults(root: yaml.Node, written: Mapping[str, object], error: ValidationError, place: Place) -> list[Fault]:
    errors = error.errors(include_url=False)
    found = {(_place(item["loc"]), _explain(item["type"], item["msg"])) for item in errors}
    if errors[0]["type"] != "rule":  # rules wait until all fields are in order; ask those that can already be asked
        found |= _rules_beside(written, [path for path, _ in found], place)
    faults = [Fault(line=_line(root, path), path=_dotted(path), message=message) for path, message in found]
    return sorted(faults, key=lambda fault: (fault.line, fault.path, fault.message))


def _rules_beside(written: Mapping[str, object], faulty: list[Location], place: Place) -> set[tuple[Location, str]]:
    """Broken rules of the parts that no faulty field belongs to."""
    try:
        service = InferenceService.model_validate(_without(written, faulty, ()))
    except ValidationError:
        return set()
    return {
        (item.path, item.message)
        for item in violations(service, place)
        if not any(path[: len(item.of)] == item.of for path in faulty)
    }


def _without(value: object, faulty: list[Location], here: Location) -> object:
    if isinstance(value, Mapping):
        return {key: _without(item, faulty, (*here, key)) for key, item in value.items() if (*here, key) not in faulty}
    return value


def _place(location: tuple[int | str, ...]) -> Location:
    """Without the mark that pydantic puts behind the key of a map when the key is at fault."""
    return location[:-1] if location[-1:] == ("[key]",) else location


def _explain(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown field; remove it or check its spelling"
    if kind == "missing":
        return "required, but missing"
    return message.removeprefix("Value error, ")


def _dotted(path: Location) -> str:
    return ".".join(str(part) for part in path)


def _line(root: yaml.Node, path: Location) -> int:
    """Line of the key at `path`, or of the nearest thing above it that is written down."""
    line, node = root.start_mark.line, root
    for part in path:
        children: dict[int | str, tuple[int, yaml.Node]] = {}
        if isinstance(node, yaml.MappingNode):
            children = {str(key.value): (key.start_mark.line, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            children = {index: (item.start_mark.line, item) for index, item in enumerate(node.value)}
        if part not in children:
            break
        line, node = children[part]
    return line + 1


def _traps(node: yaml.Node, path: tuple[str, ...], above: tuple[yaml.Node, ...] = ()) -> Iterator[Fault]:
    """Keys written twice, and nodes that contain themselves (an alias to something above it)."""
    line = node.start_mark.line + 1
    if any(node is other for other in above):
        yield Fault(line=line, path=_dotted(path), message="contains itself through an alias")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _traps(item, (*path, str(index)), (*above, node))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            here, key_line = (*path, str(key.value)), key.start_mark.line + 1
            if here[-1] in seen:
                yield Fault(line=key_line, path=_dotted(here), message=f"written twice, first on line {seen[here[-1]]}")
            seen.setdefault(here[-1], key_line)
            yield from _traps(value, here, (*above, node))
