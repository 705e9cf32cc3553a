"""Kubernetes objects as plain JSON, read without surprises: an absent field and a field of the wrong type are empty.

Objects are never changed in place by anyone who did not make them. Knows no kind and no API.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Object: TypeAlias = Mapping[str, Json]


def at(value: Json, *path: str) -> Json:
    """What lies at `path`, or None."""
    for part in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def text(value: Json, *path: str) -> str:
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def integer(value: Json, *path: str) -> int:
    found = at(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else 0


def mapping(value: Json, *path: str) -> Object:
    found = at(value, *path)
    return found if isinstance(found, Mapping) else {}


def items(value: Json, *path: str) -> Sequence[Json]:
    found = at(value, *path)
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()


def objects(value: Json, *path: str) -> list[Object]:
    """The mappings in the list at `path`."""
    return [item for item in items(value, *path) if isinstance(item, Mapping)]


def texts(value: Json, *path: str) -> list[str]:
    """The strings in the list at `path`."""
    return [item for item in items(value, *path) if isinstance(item, str)]


def is_true(value: Json, *path: str) -> bool:
    return at(value, *path) is True


def canonical(value: Json) -> str:
    """Equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def digest(value: Json, *, length: int = 10) -> str:
    """Hex digits that name the value; fit for a label."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def _plain(value: object) -> object:
    """Mappings that are no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"not JSON: {value!r}")
