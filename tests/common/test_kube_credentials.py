"""Kubeconfigs: who we are, and what is said when that cannot be found out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton_common.clock import ManualClock
from baton_common.errors import ConfigError
from baton_common.kube.credentials import TokenSource, find_credentials


def kubeconfig(folder: Path, user: dict[str, Any], **cluster: Any) -> str:
    file = folder / "config"
    file.write_text(yaml.safe_dump({
        "current-context": "one",
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443/", **cluster}}],
        "users": [{"name": "u", "user": user}],
    }))  # fmt: skip
    return str(file)


def program(folder: Path, body: str, **more: Any) -> dict[str, Any]:
    """The `exec` entry for a Python program."""
    script = folder / "login.py"
    script.write_text(f"import json, os, sys\n{body}\n")
    return {"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(script)], **more,
    }}  # fmt: skip


PRINT = 'print(json.dumps({"status": {"token": TOKEN}}))'


def test_a_token_file_is_read_again_after_a_minute(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    found = find_credentials(kubeconfig(tmp_path, {"tokenFile": "token"}), {})
    assert (found.server, found.namespace) == ("https://10.0.0.1:6443", "team")
    clock = ManualClock()
    source = TokenSource(found, clock)
    assert source.token() == "first"
    (tmp_path / "token").write_text("second\n")
    assert source.token() == "first"
    clock.advance(61)
    assert source.token() == "second"


def test_a_program_logs_in_with_its_arguments_and_environment(tmp_path: Path) -> None:
    user = program(
        tmp_path, 'TOKEN = os.environ["REGION"] + sys.argv[1]; ' + PRINT, env=[{"name": "REGION", "value": "north-"}],
    )  # fmt: skip
    user["exec"]["args"].append("one")
    assert find_credentials(kubeconfig(tmp_path, user), {}).read_token() == "north-one"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_program_hears_of_the_cluster_only_if_it_asks(tmp_path: Path, wanted: bool) -> None:
    body = 'TOKEN = os.environ["KUBERNETES_EXEC_INFO"]; ' + PRINT
    user = program(tmp_path, body, provideClusterInfo=wanted)
    info = json.loads(find_credentials(kubeconfig(tmp_path, user), {}).read_token())
    assert info["kind"] == "ExecCredential"
    assert info["spec"]["interactive"] is False
    assert info["spec"].get("cluster", {}).get("server") == ("https://10.0.0.1:6443/" if wanted else None)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('run `cloud login` first')", "run `cloud login` first"),
        ("print('hello')", "printed no token"),
        ("print(json.dumps({'status': {}}))", "printed no token"),
    ],
)
def test_a_program_that_fails_is_quoted(tmp_path: Path, body: str, said: str) -> None:
    found = find_credentials(kubeconfig(tmp_path, program(tmp_path, body)), {})
    with pytest.raises(ConfigError, match=said):
        found.read_token()


def test_a_program_that_is_not_there_is_named_with_its_hint(tmp_path: Path) -> None:
    user = {"exec": {"command": "no-such-cloud-login", "installHint": "install it\nfrom the cloud's site"}}
    found = find_credentials(kubeconfig(tmp_path, user), {})
    with pytest.raises(ConfigError, match="no-such-cloud-login, which is not installed: install it from the cloud"):
        found.read_token()


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"auth-provider": {"name": "gcp"}}, "auth-provider"),
        ({"client-key": "nowhere.pem"}, "client-key cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, user: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_credentials(kubeconfig(tmp_path, user), {})


def test_without_anything_the_two_ways_are_named() -> None:
    with pytest.raises(ConfigError, match="--kubeconfig FILE, or run in a pod"):
        find_credentials("", {})
