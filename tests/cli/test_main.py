"""The command line as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.explain import SECTIONS
from baton_common.settings import describe

BATON = Path(sys.executable).with_name("baton")


def baton(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_STATE_HOME": str(home), **variables}
    return subprocess.run(
        [str(BATON), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_without_a_service_commands_say_so_and_down_is_content(tmp_path: Path) -> None:
    status, down = baton("status", home=tmp_path), baton("down", home=tmp_path)
    assert (status.returncode, status.stdout) == (1, "baton: no service is running\n")
    assert (down.returncode, down.stdout) == (0, "baton: no service is running\n")
    named = baton("down", "--name", "mine", home=tmp_path)
    assert (named.returncode, named.stdout) == (0, "baton: no service 'mine' is running\n")


def test_validate_prints_faults_like_a_compiler_and_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("apiVersion: serving.baton.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: x}\nspecs: {}\n")
    run = baton("validate", str(file), home=tmp_path)
    assert run.returncode == 2
    assert f"{file}:4: specs: unknown field" in run.stderr
    assert "Traceback" not in run.stderr


def test_validate_asks_for_a_cluster_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "apiVersion: serving.baton.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: x}\n"
        "spec:\n  model: {uri: file:///models/x}\n"
    )
    run = baton("validate", str(file), home=tmp_path)
    assert run.returncode == 2
    assert f"{file}:5: spec.model.uri: file:// is a folder of one machine" in run.stderr
    run = baton("validate", "--local", str(file), home=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "x is valid: file:///models/x, 1 prefill, 1 decode, 0 colocated" in run.stdout


def test_explain_shows_value_and_source(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("engine:\n  max_rows: 8\n")
    run = baton("explain", "engine", "--config", str(settings), home=tmp_path, BATON_ENGINE_STEP_TOKENS="128")
    rows = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    assert "128" in rows["step_tokens"]
    assert "BATON_ENGINE_STEP_TOKENS" in rows["step_tokens"]
    assert "settings.yaml" in rows["max_rows"]
    assert "default" in rows["page_tokens"]


@pytest.mark.parametrize("section", ["router", "worker", "engine", "transfer"])
def test_every_setting_has_a_description(section: str) -> None:
    missing = [name for name, text in describe(SECTIONS[section]).items() if not text]
    assert missing == []


def test_a_wrong_setting_is_one_line_that_names_it(tmp_path: Path) -> None:
    run = baton("explain", "engine", home=tmp_path, BATON_ENGINE_PAGE_TOKENS="7")
    assert run.returncode == 2
    assert run.stderr.startswith("baton: engine.page_tokens (env BATON_ENGINE_PAGE_TOKENS)")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [("--prefill", "1", "--decode", "0"), ("--name", "Not Good"), ("/no/such/model",)])
@pytest.mark.parametrize("mode", [(), ("--detach",)])
def test_up_refuses_a_mistake_in_one_line(tmp_path: Path, flags: tuple[str, ...], mode: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    target = () if flags[0].startswith("/") else (str(tmp_path),)
    run = baton("up", *target, *flags, *mode, home=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("baton: ")
    assert "Traceback" not in run.stderr


def test_no_command_that_only_looks_loads_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "import baton.main, baton.up, baton.chat, baton.status, baton.cluster_status, baton.render\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
