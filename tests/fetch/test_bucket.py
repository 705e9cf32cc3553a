"""Checkpoints from a real S3 server: what is fetched, how it is verified, and what goes wrong there."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.fetching import QUICK, SHARDS, SMALL, UNWANTED, contents, fetch
from support.s3_server import PART_BYTES, S3Server
from support.tcp_proxy import TcpProxy

from baton_fetch.errors import FetchFailed, Mistake
from baton_fetch.request import Request


def upload(s3: S3Server, bucket: str, files: Mapping[str, bytes], *, checksum: str = "") -> None:
    for name, data in files.items():
        s3.put(bucket, f"llama/{name}", data, checksum=checksum)


def request(s3: S3Server, bucket: str, folder: Path, *, url: str = "", only_tokenizer: bool = False) -> Request:
    return Request(
        uri=f"s3://{bucket}/llama", folder=folder, endpoint=url or s3.url, only_tokenizer=only_tokenizer
    )


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    files: dict[str, dict[str, str]] = json.loads((folder / ".baton-fetch/manifest.json").read_text())["files"]
    return files


def test_what_serving_needs_is_fetched_and_nothing_else(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    upload(s3, bucket, files)
    s3.put(bucket, "llama/original/config.json", b"of another format")
    fetch(request(s3, bucket, tmp_path))
    assert contents(tmp_path) == wanted


def test_a_router_gets_no_weights_and_a_worker_completes_the_same_folder(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy:
        fetch(request(s3, bucket, tmp_path, url=proxy.url, only_tokenizer=True))
        assert set(contents(tmp_path)) == set(SMALL) - {"model.safetensors.index.json"}
        assert proxy.sent_bytes < 100_000
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
    assert contents(tmp_path) == wanted


def test_a_complete_folder_is_complete_without_the_server(
    s3: S3Server, bucket: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy:
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
        before = proxy.sent_bytes
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
        fetch(request(s3, bucket, tmp_path, url=proxy.url, only_tokenizer=True))
        assert proxy.sent_bytes == before


def test_a_file_that_lost_its_end_is_fetched_again_and_only_that_one(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy:
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
        (tmp_path / SHARDS[1]).write_bytes(b"half")
        before = proxy.sent_bytes
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
        assert contents(tmp_path) == wanted
        assert proxy.sent_bytes - before < len(wanted[SHARDS[1]]) + 100_000


@pytest.mark.parametrize("checksum", ["SHA256", "CRC32", "CRC32C", "CRC64NVME", "SHA1"])
def test_the_checksum_of_the_server_is_what_verifies(
    s3: S3Server, bucket: str, files: dict[str, bytes], tmp_path: Path, checksum: str
) -> None:
    upload(s3, bucket, files, checksum=checksum)
    fetch(request(s3, bucket, tmp_path))
    assert {entry["algorithm"] for entry in manifest(tmp_path).values()} == {checksum.lower()}


def test_an_upload_in_parts_is_verified_by_the_digests_of_its_parts(
    s3: S3Server, bucket: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    files[SHARDS[0]] = random.Random(3).randbytes(2 * PART_BYTES + 12_345)
    upload(s3, bucket, files)
    s3.put_in_parts(bucket, f"llama/{SHARDS[0]}", files[SHARDS[0]])
    fetch(request(s3, bucket, tmp_path))
    assert (tmp_path / SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert manifest(tmp_path)[SHARDS[0]]["algorithm"] == "md5"


def test_a_corrupted_body_is_fetched_again_once(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    files[SHARDS[0]] = wanted[SHARDS[0]] = b"needle in a hay " * 200_000
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy, caplog.at_level(logging.WARNING):
        proxy.corrupt, proxy.corruptions = b"needle", 1
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
        assert proxy.corruptions == 0
    assert contents(tmp_path) == wanted
    assert [record.message for record in caplog.records if "fetching it again" in record.message]


def test_a_body_corrupted_for_good_is_an_error_that_names_the_file(
    s3: S3Server, bucket: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    files[SHARDS[0]] = b"needle in a hay " * 200_000
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy:
        proxy.corrupt, proxy.corruptions = b"needle", 1_000_000
        with pytest.raises(FetchFailed, match=rf"{SHARDS[0]}: md5 is [0-9a-f]+, should be [0-9a-f]+, twice") as caught:
            fetch(request(s3, bucket, tmp_path, url=proxy.url))
    assert caught.value.exit_status == 1
    assert SHARDS[0] not in contents(tmp_path)


def test_an_object_that_changed_under_a_half_file_is_begun_anew(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    upload(s3, bucket, files)
    with TcpProxy(s3.port) as proxy:
        proxy.corrupt, proxy.corruptions = files[SHARDS[1]][:16], 2     # the second shard fails, the folder is half
        with pytest.raises(FetchFailed):
            fetch(request(s3, bucket, tmp_path, url=proxy.url))
        parts = tmp_path / ".baton-fetch" / "parts"
        (parts / f"{SHARDS[1]}.part").write_bytes(files[SHARDS[1]][:1000])
        (parts / f"{SHARDS[1]}.pin").write_text('"an etag of yesterday"')
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
    assert contents(tmp_path) == wanted


def test_an_upload_while_fetching_ends_in_files_of_one_upload(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """Both shards are replaced after the first one is there: it must not stay."""
    upload(s3, bucket, files)
    newer = {name: random.Random(9).randbytes(2_000_000 + number) for number, name in enumerate(SHARDS)}

    class Watched(TcpProxy):
        def _touched(self, data: bytes) -> bytes:
            if (tmp_path / SHARDS[0]).exists() and newer:
                upload(s3, bucket, {name: newer.pop(name) for name in SHARDS})
            return super()._touched(data)

    expected = {**wanted, **newer}
    with Watched(s3.port) as proxy:
        fetch(request(s3, bucket, tmp_path, url=proxy.url))
    assert contents(tmp_path) == expected


def test_signed_requests_are_taken_and_wrong_keys_are_the_users_mistake(
    s3: S3Server, bucket: str, files: dict[str, bytes], wanted: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    upload(s3, bucket, files)
    with s3.signatures_checked():
        fetch(request(s3, bucket, tmp_path / "right"))
        assert contents(tmp_path / "right") == wanted
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(Mistake, match=r"denied \(SignatureDoesNotMatch\); check the keys in credentialsSecret"):
            fetch(request(s3, bucket, tmp_path / "wrong"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket-here/llama", "no such bucket; check spec.model.uri and endpoint"),
        ("s3://{bucket}/lama", "nothing is there; check the bucket and the prefix"),
    ],
)
def test_what_is_not_there_is_the_users_mistake(
    s3: S3Server, bucket: str, files: dict[str, bytes], tmp_path: Path, uri: str, message: str
) -> None:
    upload(s3, bucket, files)
    with pytest.raises(Mistake, match=message):
        fetch(Request(uri=uri.format(bucket=bucket), folder=tmp_path, endpoint=s3.url))


def test_a_checkpoint_without_safetensors_says_so(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    upload(s3, bucket, {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(Mistake, match=r"no weights as safetensors \(pytorch_model.bin is another format\)"):
        fetch(request(s3, bucket, tmp_path))
    fetch(request(s3, bucket, tmp_path, only_tokenizer=True))
    assert not set(UNWANTED) & set(contents(tmp_path))


def test_a_server_that_is_not_there_is_given_up_with_the_cause(tmp_path: Path, s3: S3Server) -> None:
    with TcpProxy(s3.port) as proxy:
        url = proxy.url
    with pytest.raises(FetchFailed, match=r"s3://models/llama: gave up after .* without an answer \(.*127\.0\.0\.1"):
        fetch(Request(uri="s3://models/llama", folder=tmp_path, endpoint=url), limits=QUICK)
