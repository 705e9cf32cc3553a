"""Checkpoints from a server that speaks the hub's API: pinned, resumed, verified, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.fetching import QUICK, SHARDS, contents, fetch
from support.hub_server import HubServer, git_digest

from baton_fetch.errors import FetchFailed, Mistake
from baton_fetch.request import Request

NAME = "acme/llama"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)


def request(hub: HubServer, folder: Path, *, uri: str = f"hf://{NAME}", revision: str = "") -> Request:
    return Request(uri=uri, folder=folder, endpoint=hub.url, revision=revision)


def state(folder: Path) -> Path:
    return folder / ".baton-fetch"


def test_what_serving_needs_is_fetched_and_verified_by_the_hubs_digests(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.publish(NAME, files)
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted
    manifest = json.loads((state(tmp_path) / "manifest.json").read_text())
    assert (manifest["version"], manifest["complete"]) == (commit, "all")
    shard, config = manifest["files"][SHARDS[0]], manifest["files"]["config.json"]
    assert (shard["algorithm"], shard["digest"]) == ("sha256", hashlib.sha256(wanted[SHARDS[0]]).hexdigest())
    assert (config["algorithm"], config["digest"]) == ("git-sha1", git_digest(wanted["config.json"]))


def test_a_mirror_without_details_is_asked_per_file(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    hub.with_blobs = False
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted


def test_a_revision_is_a_tag_or_a_commit_as_a_flag_or_in_the_uri(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, {"config.json": b"of main"})
    commit = hub.publish(NAME, files, revision="v2")
    for revision in ("v2", commit):
        fetch(request(hub, tmp_path / revision, revision=revision))
        assert contents(tmp_path / revision) == wanted
    fetch(request(hub, tmp_path / "inline", uri=f"hf://{NAME}@v2"))
    assert contents(tmp_path / "inline") == wanted


def test_a_half_folder_stays_with_its_commit_though_the_branch_moved(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    fetch(Request(uri=f"hf://{NAME}", folder=tmp_path, endpoint=hub.url, only_tokenizer=True))
    hub.publish(NAME, {**files, SHARDS[0]: b"of a newer commit" * 1000})
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted


def test_a_half_file_is_continued_where_it_ends(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    folder = state(tmp_path) / "parts"
    folder.mkdir(parents=True)
    (folder / f"{SHARDS[0]}.part").write_bytes(wanted[SHARDS[0]][:2_500_000])
    (folder / f"{SHARDS[0]}.pin").write_text(hashlib.sha256(wanted[SHARDS[0]]).hexdigest())
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted
    assert hub.storage_bytes == sum(len(data) for data in wanted.values() if len(data) >= 1000) - 2_500_000


def test_the_token_goes_to_the_hub_and_never_to_its_storage(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NAME, files)
    hub.token = "hf_secret"
    with pytest.raises(Mistake, match="not found or not public"):
        fetch(request(hub, tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted
    assert not hub.storage_saw_token


def test_a_signed_address_that_expires_is_asked_for_again(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    hub.expire_after = 3
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted
    assert hub.expire_after < 0
    assert hub.resolved.count(SHARDS[0]) <= 2     # asked per file, not per range


@pytest.mark.parametrize(
    ("uri", "revision", "message"),
    [
        ("hf://nobody/nothing", "", "hf://nobody/nothing: not found or not public; check spec.model.uri, or give a"),
        (f"hf://{NAME}", "v9", "has no revision 'v9'; check spec.model.revision"),
    ],
)
def test_what_is_not_there_is_the_users_mistake(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, uri: str, revision: str, message: str
) -> None:
    hub.publish(NAME, files)
    with pytest.raises(Mistake, match=message) as caught:
        fetch(request(hub, tmp_path, uri=uri, revision=revision))
    assert caught.value.exit_status == 2


def test_a_busy_hub_is_asked_again(
    hub: HubServer, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    hub.busy = 2
    fetch(request(hub, tmp_path))
    assert contents(tmp_path) == wanted


def test_a_hub_that_stays_busy_is_given_up_with_the_cause(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    hub.busy = 1_000_000
    with pytest.raises(FetchFailed, match=r"gave up after .* \(HTTP 503 from 127\.0\.0\.1") as caught:
        fetch(request(hub, tmp_path), limits=QUICK)
    assert caught.value.exit_status == 1


def test_a_proxy_that_swallows_ranges_is_named(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.publish(NAME, files)
    hub.ranges = False
    with pytest.raises(FetchFailed, match="does not answer ranges; check the proxy"):
        fetch(request(hub, tmp_path))


def test_more_than_the_disk_holds_is_refused_before_it_is_fetched(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    hub.claimed_bytes[SHARDS[0]] = 10**18
    with pytest.raises(FetchFailed, match=r"needs 1000000\.0 TB, .* free at .*; give the model volume more room"):
        fetch(request(hub, tmp_path))
    assert SHARDS[0] not in hub.resolved
    assert not list((state(tmp_path) / "parts").glob("*.part"))


def test_an_index_that_names_what_is_not_there_is_the_users_mistake(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    del files[SHARDS[1]]
    hub.publish(NAME, files)
    with pytest.raises(Mistake, match=rf"names {SHARDS[1]}, which is not there \(1 of 2 shards are missing\)"):
        fetch(request(hub, tmp_path))
