"""API keys: who may ask, and how the keys of a mounted Secret change under a running router."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import httpx
import openai
import pytest
from router.conftest import HELLO, MODEL, House

from baton_common.clock import ManualClock
from baton_common.errors import ConfigError
from baton_proto import worker_pb2 as wire
from baton_router import keys as keys_module
from baton_router.keys import REREAD_S, ApiKeys, read_folder
from baton_router.main import main


class Secret:
    """A Secret volume as the kubelet writes it: files are links into `..data`, which is swapped by one rename."""

    def __init__(self, folder: Path, **files: str) -> None:
        self.folder = folder
        self._versions = 0
        folder.mkdir()
        self.write(**files)

    def write(self, **files: str) -> None:
        self._versions += 1
        old = Path(os.readlink(self.folder / "..data")) if self._versions > 1 else None
        dated = self.folder / f"..2026_01_01_00_00_00.{self._versions}"
        dated.mkdir()
        for name, text in files.items():
            (dated / name).write_text(text)
        (self.folder / "..data_tmp").symlink_to(dated.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(Path("..data") / name)
        for entry in self.folder.iterdir():
            if not entry.name.startswith("..") and entry.name not in files:
                entry.unlink()
        if old is not None:
            shutil.rmtree(self.folder / old)


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    return Secret(tmp_path / "keys", alice="a-key\n", bob="  b-key  \n\nb-second\n")


def made(secret: Secret, *given: str) -> tuple[ApiKeys, ManualClock]:
    clock = ManualClock()
    return ApiKeys(given, secret.folder, clock), clock


def test_a_file_is_a_tenant_and_each_of_its_lines_a_key(secret: Secret) -> None:
    keys, _ = made(secret)
    assert keys.needed
    assert [keys.tenant(key) for key in ("a-key", "b-key", "b-second")] == ["alice", "bob", "bob"]
    for wrong in ("", "a-ke", "a-key\n", "A-KEY", "alice", "b-key\n\nb-second", "é", "\udce9"):
        assert keys.tenant(wrong) is None, wrong


def test_hidden_entries_and_folders_are_no_tenants(secret: Secret) -> None:
    (secret.folder / ".hidden").write_text("h-key")
    assert set(read_folder(secret.folder)) == {"alice", "bob"}


def test_a_plain_folder_works_too(tmp_path: Path) -> None:
    (tmp_path / "alice").write_text("a-key")
    (tmp_path / ".alice.swp").write_text("half a ke")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "more").mkdir()
    assert read_folder(tmp_path) == {"alice": ["a-key"]}


def test_a_swapped_secret_is_in_force_within_two_seconds(secret: Secret) -> None:
    keys, clock = made(secret)
    secret.write(bob="b-third", carol="c-key")
    clock.advance(REREAD_S)
    assert [keys.tenant(key) for key in ("b-third", "c-key")] == ["bob", "carol"]
    assert [keys.tenant(key) for key in ("a-key", "b-key", "b-second")] == [None] * 3


def test_a_key_that_moves_to_another_file_is_never_refused(
    secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap comes while the folder is read: what was listed is gone, what came was not listed."""
    really, swaps = keys_module._read_files, iter(range(1))

    def swapped_after_listing(folder: Path) -> dict[str, list[str]]:
        if next(swaps, None) is not None:
            found = really(folder)
            secret.write(renamed="a-key")
            return {name: found[name] for name in ("bob",)}  # the rest was removed by then
        return really(folder)

    monkeypatch.setattr(keys_module, "_read_files", swapped_after_listing)
    assert read_folder(secret.folder) == {"renamed": ["a-key"]}


def test_an_empty_secret_refuses_everybody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        keys, clock = made(Secret(tmp_path / "keys"))
    assert keys.needed
    assert keys.tenant("") is None
    assert "every request is refused" in caplog.text
    clock.advance(REREAD_S)
    assert keys.tenant("anything") is None


def test_a_file_without_a_key_lets_nobody_in(tmp_path: Path) -> None:
    keys, _ = made(Secret(tmp_path / "keys", alice="\n  \n"))
    assert keys.tenant("") is None


def test_keys_of_the_settings_hold_beside_the_folder(secret: Secret) -> None:
    keys, clock = made(secret, "given")
    assert keys.tenant("given")
    assert keys.tenant("a-key") == "alice"
    secret.write()
    clock.advance(REREAD_S)
    assert keys.tenant("given")
    assert keys.tenant("a-key") is None


def test_without_any_key_setting_the_endpoint_is_open() -> None:
    assert not ApiKeys((), None, ManualClock()).needed


@pytest.mark.parametrize("damage", ["vanished", "dangling", "a file", "no text"])
def test_what_cannot_be_read_changes_nothing_and_is_told_once(
    secret: Secret, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys, clock = made(secret)
    backup = secret.folder.with_name("backup")
    if damage == "no text":
        secret.write(alice="a-key", bob="b-key")
        (secret.folder / "bob").write_bytes(b"\xff-b-key")
    else:
        secret.folder.rename(backup)
    if damage == "dangling":
        secret.folder.mkdir()
        (secret.folder / "..data").symlink_to("nowhere")
    if damage == "a file":
        secret.folder.write_text("x")
    for _ in range(3):
        clock.advance(REREAD_S)
        assert keys.tenant("a-key") == "alice"
        assert keys.tenant("wrong") is None
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert str(secret.folder) in errors[0].getMessage()
    if damage == "vanished":
        backup.rename(secret.folder)
        secret.write(dora="d-key")
        clock.advance(REREAD_S)
        assert keys.tenant("d-key") == "dora"
        assert keys.tenant("a-key") is None


def test_no_key_is_ever_logged(secret: Secret, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        keys, clock = made(secret, "given")
        keys.tenant("asked")
        secret.write(bob="b-third")
        clock.advance(REREAD_S)
        keys.tenant("asked")
    assert "alice" in str([vars(record) for record in caplog.records])
    text = str([vars(record) for record in caplog.records])
    assert not any(key in text for key in ("a-key", "b-key", "b-second", "b-third", "given", "asked"))
    assert "a-key" not in repr(vars(keys))


def test_a_missing_folder_refuses_the_start_and_says_what_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="api_keys_folder"):
        ApiKeys((), missing, ManualClock())
    arguments = ["--model", str(folder), "--listen", "127.0.0.1:0", "--workers", "127.0.0.1:1"]
    assert main([*arguments, "--api-keys-folder", str(missing)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(missing) in line
    assert "Secret" in line


async def test_a_running_endpoint_follows_the_secret(
    house: House, http: httpx.AsyncClient, secret: Secret
) -> None:
    await house.add(wire.ROLE_COLOCATED)
    clock = ManualClock()
    url = await house.serve(api_keys_folder=str(secret.folder))
    assert house.router is not None
    house.router.keys = ApiKeys((), secret.folder, clock)

    async def chat(key: str) -> int:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        if answer.status_code == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
        return answer.status_code

    assert [await chat(key) for key in ("a-key", "b-second", "wrong", "")] == [200, 200, 401, 401]
    secret.write(alice="a-new")
    clock.advance(REREAD_S)
    assert [await chat(key) for key in ("a-new", "a-key", "b-second")] == [200, 401, 401]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="a-new", max_retries=0)
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await http.get(f"{url}/ready")).status_code == 200, "probes carry no key"
