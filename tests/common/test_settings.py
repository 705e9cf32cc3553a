"""Settings: one precedence, one source per value, one clear line for a wrong one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from baton_common.errors import ConfigError
from baton_common.settings import describe, from_command_line, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Oven:
    heat: Annotated[int, Field(ge=0, le=300, description="degrees, C")] = 180
    fan: Annotated[bool, Field(description="blow")] = False


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "oven:\n  heat: 200\n  fan: true\n")
    resolved = resolve(Oven, section="oven", file=file, environment={"BATON_OVEN_HEAT": "210"}, flags={"heat": None})
    assert resolved.value == Oven(heat=210, fan=True)
    assert resolved.sources == {"heat": "env BATON_OVEN_HEAT", "fan": f"file {file}"}
    resolved = resolve(Oven, section="oven", file=file, environment={"BATON_OVEN_HEAT": "210"}, flags={"heat": "220"})
    assert (resolved.value.heat, resolved.sources["heat"]) == (220, "flag --heat")


def test_defaults_need_nothing() -> None:
    resolved = resolve(Oven, section="oven")
    assert resolved.value == Oven()
    assert set(resolved.sources.values()) == {"default"}


def test_a_value_out_of_range_names_field_source_and_value() -> None:
    with pytest.raises(ConfigError, match=r"oven\.heat \(env BATON_OVEN_HEAT\): .*300.*got '999'") as caught:
        resolve(Oven, section="oven", environment={"BATON_OVEN_HEAT": "999"})
    assert caught.value.param == "heat"


def test_an_unknown_key_in_a_file_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting oven\.hea; known: heat, fan"):
        resolve(Oven, section="oven", file=write(tmp_path, "oven: {hea: 1}"))


@pytest.mark.parametrize(
    ("text", "message"), [("oven: [1]", "mapping"), ("oven: {", "no valid YAML"), ("- 1", "mapping")]
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(Oven, section="oven", file=write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        resolve(Oven, section="oven", file=tmp_path / "none.yaml")


def test_the_command_line_has_one_flag_per_field() -> None:
    resolved, explain = from_command_line(
        Oven, section="oven", program="oven", argv=["--heat", "100", "--explain"], environment={}
    )
    assert (resolved.value.heat, explain) == (100, True)
    assert resolved.explain()[0] == ("heat", "100", "flag --heat", "degrees, C")


def test_every_field_describes_itself() -> None:
    assert describe(Oven) == {"heat": "degrees, C", "fan": "blow"}
