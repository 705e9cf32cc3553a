"""A typed view of a checkpoint's JSON: every value that is read is checked, every complaint names file and field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from baton_common.errors import ConfigError


class Fields:
    """Values of one JSON object. `null` and absent are the same, as checkpoints write both."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def with_defaults(self, defaults: Mapping[str, object]) -> Fields:
        """`defaults` stand in for absent fields; an explicit null stays null."""
        return Fields({**defaults, **self._values}, self.source)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def section(self, name: str) -> Fields | None:
        """A nested object, or None."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(cast("dict[str, object]", value), f"{self.source}: {name}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.wrong(name, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def distinct_texts(self) -> tuple[str, ...]:
        """The values of an object that maps to strings, each once, sorted."""
        for name, value in self._values.items():
            if not isinstance(value, str):
                raise self.wrong(name, "a string")
        return tuple(sorted({str(value) for value in self._values.values()}))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; empty when absent."""
        value = self._values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.wrong(name, "a token id or a list of them")
        return tuple(items)

    def wrong(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.source}: {name} must be {wanted}, got {self._values.get(name)!r}", param=name)

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.source} lacks {name}", param=name)
        return default


def read_json(path: Path) -> Fields:
    """ConfigError when the file is missing, unreadable or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return Fields(values, str(path))
