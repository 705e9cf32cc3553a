"""Configuration: frozen dataclasses, resolved once at the edge of a process, each value with its source.

Order of precedence: default < file (YAML) < environment < flag. Nothing else in the code base reads the environment.
A field is declared as `name: Annotated[type, Field(ge=..., description="what it does, unit")] = default`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from baton_common.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Generic[T]):
    """A configuration and, per field, where its value came from ("default", "file …", "env …", "flag …")."""

    value: T
    sources: Mapping[str, str]

    def explain(self) -> list[tuple[str, str, str, str]]:
        """Rows (name, value, source, description) in declaration order."""
        descriptions = describe(type(self.value))
        return [
            (name, repr(getattr(self.value, name)), source, descriptions[name])
            for name, source in self.sources.items()
        ]


def describe(config: type[Any]) -> dict[str, str]:
    """Description of every field of a configuration class."""
    hints = get_type_hints(config, include_extras=True)
    texts: dict[str, str] = {}
    for field in dataclasses.fields(config):
        notes = [note for note in getattr(hints[field.name], "__metadata__", ()) if isinstance(note, FieldInfo)]
        texts[field.name] = next((note.description for note in notes if note.description), "")
    return texts


def resolve(
    config: type[T],
    *,
    section: str,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Resolved[T]:
    """Build `config` from its sources.

    `section` names its part of the file and its variables (BATON_<SECTION>_<FIELD>).

    Raises ConfigError naming the field, the source and what is wrong.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(names, "default")

    def take(name: str, value: Any, source: str) -> None:
        values[name] = value
        sources[name] = source

    if file is not None:
        for key, value in _read_section(file, section).items():
            name = str(key).replace("-", "_")
            if name not in sources:
                raise ConfigError(f"{file}: unknown setting {section}.{key}; known: {', '.join(names)}", param=name)
            take(name, value, f"file {file}")
    for name in names:
        variable = f"BATON_{section}_{name}".upper()
        if environment is not None and variable in environment:
            take(name, environment[variable], f"env {variable}")
    for name, value in (flags or {}).items():
        if value is not None:
            take(name, value, f"flag --{name.replace('_', '-')}")
    try:
        return Resolved(value=TypeAdapter(config).validate_python(values), sources=sources)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        source = sources.get(name, "default")
        raise ConfigError(f"{section}.{name} ({source}): {first['msg']}, got {first['input']!r}", param=name) from None


def _read_section(file: Path, section: str) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from None
    part = (document or {}).get(section, {}) if isinstance(document, dict | None) else None
    if not isinstance(part, dict):
        raise ConfigError(f"{file}: {section!r} must be a mapping of settings")
    return part


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What was typed, not yet split into the sections of the configuration."""

    file: Path | None
    explain: bool
    flags: Mapping[str, Mapping[str, str | None]]  # by section and field
    environment: Mapping[str, str]

    def resolve(self, config: type[T], *, section: str) -> Resolved[T]:
        """The values of one section. Raises ConfigError like `resolve`."""
        return resolve(
            config, section=section, file=self.file, environment=self.environment, flags=self.flags[section]
        )


def parse_command_line(
    sections: Mapping[str, type[Any]],
    *,
    program: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    flag_names: Mapping[tuple[str, str], str] | None = None,
) -> CommandLine:
    """One flag per field of every section, plus --config FILE and --explain.

    A flag is called like its field, unless `flag_names` has another name for (section, field): flags are unique.
    """
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file with a section of settings per component")
    parser.add_argument("--explain", action="store_true", help="print each setting, its value and its source; exit")
    for section, config in sections.items():
        group = parser.add_argument_group(section)
        for name, text in describe(config).items():
            flag = (flag_names or {}).get((section, name), name).replace("_", "-")
            group.add_argument(f"--{flag}", dest=f"{section}.{name}", help=text.replace("%", "%%"))
    typed = vars(parser.parse_args(argv))
    flags = {
        section: {name: typed[f"{section}.{name}"] for name in describe(config)} for section, config in sections.items()
    }
    return CommandLine(file=typed["config"], explain=typed["explain"], flags=flags, environment=environment)


def from_command_line(
    config: type[T], *, section: str, program: str, argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[Resolved[T], bool]:
    """The same for a program with one section. Returns the configuration and whether to explain only."""
    line = parse_command_line({section: config}, program=program, argv=argv, environment=environment)
    return line.resolve(config, section=section), line.explain
