"""`--tiers`: one text; what cannot work is refused with its part and the remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from baton_common.errors import ConfigError
from baton_kvtransfer.tiers import TierConfig
from baton_worker.config import WorkerConfig
from baton_worker.tiering import EXAMPLE, check_folder, parse_tiers

GIB = 1 << 30


def test_every_part_is_understood() -> None:
    assert parse_tiers(EXAMPLE) == TierConfig(
        host_bytes=8 * GIB, folder="/var/kv", folder_bytes=64 * GIB, mooncake_master="master:50051",
        mooncake_segment_bytes=4 * GIB, session_bytes=2 * GIB,
    )  # fmt: skip


def test_nothing_is_no_tier() -> None:
    assert not parse_tiers("").host_bytes
    assert not parse_tiers(WorkerConfig().tiers).host_bytes


def test_sessions_of_a_tenant_keep_half_of_the_host_memory_by_default() -> None:
    assert parse_tiers("host=8GiB").session_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("16KiB", 1 << 14), ("512MiB", 1 << 29), ("1.5GiB", 3 << 29), ("2Gi", 2 * GIB), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_tiers(f"host={text}").host_bytes == size


def test_a_folder_may_have_a_colon_and_a_master_be_an_ipv6_address() -> None:
    config = parse_tiers("host=1GiB, file=/a:b:2GiB, mooncake=[::1]:50051:0")
    assert (config.folder, config.folder_bytes) == ("/a:b", 2 * GIB)
    assert (config.mooncake_master, config.mooncake_segment_bytes) == ("[::1]:50051", 0)


@pytest.mark.parametrize(
    ("text", "part", "remedy"),
    [
        ("disk=1GiB", "disk=1GiB", "no tier is called 'disk'; there are host, file, mooncake, sessions"),
        ("host", "host", "write host=8GiB"),
        ("host=", "host=", "write host=8GiB"),
        ("host=much", "host=much", "write a number and KiB, MiB, GiB or TiB: host=8GiB"),
        ("host=8GB", "host=8GB", "'8GB' is no size"),
        ("host=0", "host=0", "'0' is no size"),
        ("host=1GiB,host=2GiB", "host=2GiB", "name it once"),
        ("host=1GiB,file=/var/kv", "file=/var/kv", "it has no size; write file=/var/kv:64GiB"),
        ("host=1GiB,file=/var/kv:", "file=/var/kv:", "'' is no size"),
        ("host=1GiB,file=kv:1GiB", "file=kv:1GiB", "'kv' is no absolute path"),
        ("host=1GiB,mooncake=master:50051", "mooncake=master:50051", "write mooncake=master:50051:4GiB, or 0"),
        ("host=1GiB,mooncake=50051:1GiB", "mooncake=50051:1GiB", "it needs the master's host:port"),
        ("file=/var/kv:1GiB", "file=/var/kv:1GiB", "all tiers land in host memory; add host="),
        ("sessions=1GiB", "sessions=1GiB", "add host="),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_names_the_part_and_the_remedy(text: str, part: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        WorkerConfig(tiers=text)
    assert str(refusal.value).startswith(f"--tiers {part!r}: ")
    assert remedy in str(refusal.value)
    assert refusal.value.param == "tiers"


def test_a_folder_is_made(tmp_path: Path) -> None:
    check_folder(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"it cannot be used .*give a folder that this process can write to"):
        check_folder(str(tmp_path / "file" / "kv"))


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EACCES, True), (errno.EROFS, False), (errno.ENOSPC, False), (errno.EDQUOT, False)]
)
def test_a_full_or_read_only_disk_is_no_mistake_of_the_setting(
    number: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", touch)
    if refused:
        with pytest.raises(ConfigError, match=os.strerror(number)):
            check_folder(str(tmp_path))
    else:
        check_folder(str(tmp_path))
