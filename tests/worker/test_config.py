"""One command line for several sections; wrong settings end in one line that names them."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint

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


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """`run` sets up logging for its process, which here is the one of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a worker which refuses to start writes."""
    assert run(PROGRAM, ["--listen", "127.0.0.1:0", "--log-level", "error", *argv], {}) == 2
    error = capsys.readouterr().err
    assert error.startswith("baton-decode: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--model is missing"),
        (["--model", "/nowhere"], "no model at '/nowhere'"),
        (["--model", "m", "--role", "prefill"], "baton-decode has no role 'prefill'"),
        (["--model", "m", "--drain-s", "-1"], "worker.drain_s (flag --drain-s)"),
        (["--model", "m", "--page-tokens", "7"], "engine.page_tokens (flag --page-tokens)"),
        (["--model", "m", "--tiers", "disk=1GiB"], "--tiers 'disk=1GiB': no tier is called 'disk'"),
        (["--model", "m", "--tiers", "host=1GiB,file=/var/kv"], "it has no size; write file=/var/kv:64GiB"),
    ],
)
def test_a_wrong_setting_is_named(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refusal(argv, capsys)


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "layers.3." in refusal(["--model", str(folder)], capsys)


def test_a_checkpoint_of_an_unknown_family_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    renamed = config | {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(renamed))
    assert "strange" in refusal(["--model", str(folder)], capsys).lower()


def test_a_damaged_weights_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert "model.safetensors" in refusal(["--model", str(folder)], capsys)


@pytest.mark.parametrize("flag", ["--listen", "--peer-listen", "--metrics-port"])
def test_a_port_in_use_is_said_with_its_number(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        value = str(port) if flag == "--metrics-port" else f"127.0.0.1:{port}"
        text = refusal(["--model", str(folder), "--dtype", "float32", "--pages", "64", flag, value], capsys)
    assert str(port) in text
    assert "in use" in text


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("host=1KiB", "host=1024 does not hold 4 pages of"),
        ("host=64MiB,file={folder}/model.safetensors/kv:1GiB", "it cannot be used (Not a directory)"),
        ("host=900TiB", "MiB of memory are left, too few for host=943718400MiB; write host="),
    ],
)
def test_tiers_that_cannot_work_here_are_refused_with_the_remedy(
    tiers: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    text = refusal(["--model", str(folder), "--pages", "64", "--tiers", tiers.format(folder=folder)], capsys)
    assert says in text


def test_explain_prints_each_setting_and_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROGRAM, ["--explain", "--model", "m"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("worker.model = 'm'    (flag --model)") for line in lines)
    assert len(lines) == sum(len(dataclasses.fields(config)) for config in SECTIONS.values())
