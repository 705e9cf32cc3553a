"""One command line for several sections; wrong settings end in one line that names them."""

from __future__ import annotations

import dataclasses

import pytest

from baton_common.errors import ConfigError
from baton_common.settings import parse_command_line
from baton_decode.main import PROGRAM
from baton_worker.config import WorkerConfig, split_address
from baton_worker.process import FLAG_NAMES, SECTIONS, run


def test_every_setting_of_every_section_has_a_flag_of_its_own() -> None:
    line = parse_command_line(SECTIONS, program="p", argv=[], environment={}, flag_names=FLAG_NAMES)
    for section, config in SECTIONS.items():
        assert set(line.flags[section]) == {field.name for field in dataclasses.fields(config)}


def test_flags_find_their_section_and_say_so() -> None:
    argv = ["--listen", "127.0.0.1:1", "--peer-listen", "127.0.0.1:2", "--dtype", "float32"]
    line = parse_command_line(
        SECTIONS, program="p", argv=argv, environment={"BATON_WORKER_DRAIN_S": "3"}, flag_names=FLAG_NAMES
    )
    worker = line.resolve(WorkerConfig, section="worker")
    assert (worker.value.listen, worker.value.drain_s) == ("127.0.0.1:1", 3.0)
    assert worker.sources["drain_s"] == "env BATON_WORKER_DRAIN_S"
    assert line.resolve(SECTIONS["transfer"], section="transfer").value.listen == "127.0.0.1:2"


@pytest.mark.parametrize("address", ["9001", "host", ":9001", "host:port", "host:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="write host:port"):
        split_address(address, "listen")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--model is missing"),
        (["--model", "/nowhere"], "no model at '/nowhere'"),
        (["--model", "m", "--role", "prefill"], "baton-decode has no role 'prefill'"),
        (["--model", "m", "--drain-s", "-1"], "worker.drain_s (flag --drain-s)"),
        (["--model", "m", "--page-tokens", "7"], "engine.page_tokens (flag --page-tokens)"),
    ],
)
def test_a_worker_refuses_to_start_with_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(PROGRAM, ["--listen", "127.0.0.1:0", "--log-level", "error", *argv], {}) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("baton-decode: ")
    assert error.count("\n") == 1


def test_explain_prints_each_setting_and_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROGRAM, ["--explain", "--model", "m"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("worker.model = 'm'    (flag --model)") for line in lines)
    assert len(lines) == sum(len(dataclasses.fields(config)) for config in SECTIONS.values())
