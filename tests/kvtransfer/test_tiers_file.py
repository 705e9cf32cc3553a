"""A folder of pages: damage, restarts, full disks, disks that cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.kv_tiers import FORMAT, FRAME_BYTES, chain, frame_of, keys_of, metrics, small_disk, value

from baton_common.clock import ManualClock
from baton_kvtransfer.tiers import TierFault
from baton_kvtransfer.tiers.file import FileTier
from baton_kvtransfer.tiers.frames import TierKey
from baton_kvtransfer.tiers.guard import Guard
from baton_kvtransfer.tiers.metrics import TierMetrics

ON_DISK = 4096
KEYS = keys_of(chain(8))
RETRY_S = 30.0


class Folder:
    """A file tier as the room uses it, and what it counted."""

    def __init__(self, path: Path, pages: int = 100) -> None:
        self.path = path
        self.metrics: TierMetrics = metrics()
        self.clock = ManualClock()
        self.tier = FileTier(path, quota_bytes=pages * ON_DISK, metrics=self.metrics)
        self.guard = Guard(
            self.tier, FORMAT, clock=self.clock, metrics=self.metrics, retry_s=RETRY_S, slow_s=5.0
        )  # fmt: skip
        self.guard.open()

    def put(self, *keys: TierKey) -> None:
        for key in keys:
            self.guard.put(key, frame_of(key, key[0]))

    def get(self, key: TierKey) -> bool:
        out = memoryview(bytearray(FRAME_BYTES))
        good = self.guard.get(key, out)
        assert not good or out == frame_of(key, key[0]), "another page came back"
        return good

    def file(self, key: TierKey) -> Path:
        return self.path / key.hex()[:2] / f"{key.hex()}.page"

    def off(self, call: str) -> bool:
        return value(self.metrics.off, "file", call) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path / "pages")
    yield made
    made.guard.close()


def test_pages_come_back_as_they_went(folder: Folder) -> None:
    folder.put(*KEYS[:3])
    assert folder.guard.has(KEYS) == 3
    assert all(map(folder.get, KEYS[:3]))
    assert not folder.get(KEYS[3])
    assert value(folder.metrics.stored, "file") == folder.tier.bytes == 3 * ON_DISK
    assert value(folder.metrics.hits, "file") == 3
    assert value(folder.metrics.bytes, "file", "in") == value(folder.metrics.bytes, "file", "out") == 3 * 2048


@pytest.mark.parametrize("bit", [0, 8 * 9, 8 * 25, 8 * 33, 8 * 45, 8 * 64, 8 * 1000 + 3, 8 * FRAME_BYTES - 1])
def test_a_flipped_bit_is_a_miss_and_the_page_is_deleted(folder: Folder, bit: int) -> None:
    """In the magic, the key, the size, the digest, the padding, anywhere in the payload."""
    folder.put(KEYS[0])
    raw = bytearray(folder.file(KEYS[0]).read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    folder.file(KEYS[0]).write_bytes(raw)
    assert not folder.get(KEYS[0])
    assert not folder.file(KEYS[0]).exists()
    assert (folder.guard.has(KEYS), folder.tier.bytes) == (0, 0)
    assert value(folder.metrics.damaged, "file") == 1


@pytest.mark.parametrize("size", [1, 63, 64, FRAME_BYTES - 1, FRAME_BYTES + 1, 3 * FRAME_BYTES])
def test_a_file_of_another_length_is_a_miss(folder: Folder, size: int) -> None:
    folder.put(KEYS[0])
    folder.file(KEYS[0]).write_bytes((bytes(frame_of(KEYS[0], KEYS[0][0])) * 3)[:size])
    assert not folder.get(KEYS[0])
    assert value(folder.metrics.damaged, "file") == 1


def test_swapped_files_are_misses(folder: Folder) -> None:
    folder.put(*KEYS[:2])
    one, other = (folder.file(key).read_bytes() for key in KEYS[:2])
    folder.file(KEYS[0]).write_bytes(other)
    folder.file(KEYS[1]).write_bytes(one)
    assert not folder.get(KEYS[0])
    assert not folder.get(KEYS[1])
    assert value(folder.metrics.damaged, "file") == 2


def test_a_file_that_vanished_or_was_emptied_is_a_miss(folder: Folder) -> None:
    folder.put(*KEYS[:2])
    folder.file(KEYS[0]).unlink()
    folder.file(KEYS[1]).write_bytes(b"")
    assert not folder.get(KEYS[0])
    assert not folder.get(KEYS[1])
    assert not folder.off("read")


def test_the_least_recently_used_page_makes_room(tmp_path: Path) -> None:
    folder = Folder(tmp_path, pages=3)
    folder.put(*KEYS[:3])
    assert folder.get(KEYS[0])
    folder.put(*KEYS[3:5])
    assert [key in folder.tier._sizes for key in KEYS[:5]] == [True, False, False, True, True]
    assert value(folder.metrics.evictions, "file") == 2
    assert folder.tier.bytes == 3 * ON_DISK == sum(ON_DISK for _ in tmp_path.rglob("*.page"))


def test_a_quota_below_one_page_refuses(tmp_path: Path) -> None:
    folder = Folder(tmp_path, pages=0)
    folder.put(KEYS[0])
    assert not folder.get(KEYS[0])
    assert value(folder.metrics.skipped, "file", "refused") == 1
    assert not folder.off("write")


def test_pages_and_their_order_survive_a_restart(tmp_path: Path) -> None:
    first = Folder(tmp_path, pages=3)
    first.put(*KEYS[:3])
    for age, key in enumerate((KEYS[1], KEYS[0], KEYS[2])):  # the first is the one that waited longest
        os.utime(first.file(key), (1000 + age, 1000 + age))
    first.file(KEYS[2]).with_suffix(".part").write_bytes(b"half")
    (tmp_path / "note.txt").write_text("not a page")
    (first.file(KEYS[2]).parent / "zz.page").write_text("not a page either")
    first.guard.close()
    second = Folder(tmp_path, pages=3)
    assert second.guard.has(KEYS) == 3
    second.put(KEYS[3])
    assert [second.get(key) for key in KEYS[:4]] == [True, False, True, True]
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_process_leaves_whole_pages_only(tmp_path: Path) -> None:
    """kill -9 while it writes; whatever it published is right, and the folder is free again."""
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from support.kv_tiers import chain, frame_of, keys_of, metrics
from baton_kvtransfer.tiers.file import FileTier
tier = FileTier(Path({str(tmp_path)!r}), quota_bytes=1 << 30, metrics=metrics())
tier.open()
for salt in range(10**6):
    for key in keys_of(chain(8, salt)):
        tier.put(key, frame_of(key, key[0]))
    print(salt, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)][-1] == "2\n"
        process.kill()
    folder = Folder(tmp_path, pages=1 << 20)
    assert all(folder.get(key) for salt in range(3) for key in keys_of(chain(8, salt)))
    assert all(map(folder.get, list(folder.tier._sizes)))
    assert value(folder.metrics.damaged, "file") == 0


def test_two_processes_do_not_share_a_folder(folder: Folder) -> None:
    with pytest.raises(TierFault, match="give every worker a folder of its own"):
        FileTier(folder.path, quota_bytes=ON_DISK, metrics=metrics()).open()


# ---- disks that fail -------------------------------------------------------------------------------------------------
@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB; skips where tests may not mount."""
    with small_disk(tmp_path / "mount", size="128k") as path:
        yield path


def test_a_full_disk_turns_writes_off_with_one_warning_and_is_still_read(
    mounted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(mounted, pages=1000)
    keys = keys_of(chain(60))
    folder.put(*keys)
    stored = folder.guard.has(keys)
    assert 4 < stored < 40
    assert all(map(folder.get, keys[:stored]))
    assert (folder.off("write"), folder.off("read")) == (True, False)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "a tier is off: OSError: [Errno 28] No space left on device"
    ]
    assert not list(mounted.rglob("*.part"))
    for key in keys[:stored]:
        folder.file(key).unlink()
    folder.clock.advance(RETRY_S)
    folder.put(keys[59])
    assert folder.get(keys[59])
    assert not folder.off("write")
    folder.guard.close()


def test_a_disk_that_becomes_read_only_is_still_read(mounted: Path) -> None:
    folder = Folder(mounted)
    folder.put(KEYS[0])
    folder.guard.close()  # no file is open for writing
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    folder.put(KEYS[1])
    assert (folder.off("write"), folder.off("read")) == (True, False)
    assert folder.get(KEYS[0])


def test_a_folder_that_cannot_be_made_turns_the_tier_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    folder = Folder(tmp_path / "file" / "pages")
    folder.put(*KEYS)
    assert not folder.get(KEYS[0])
    assert folder.guard.has(KEYS) == 0
    assert folder.off("write")
    assert folder.off("read")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_leaves_nothing_behind(folder: Folder, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("baton_kvtransfer.tiers.file.os.pwrite", fail)
    folder.put(KEYS[0])
    assert folder.off("write")
    assert not folder.get(KEYS[0])
    assert not [path for path in folder.path.rglob("*") if path.is_file() and path.name != "lock"]


def test_short_writes_and_reads_are_completed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:100], at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:100]], at))
    folder.put(KEYS[0])
    assert folder.get(KEYS[0])


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_calls_and_damage_keeps_the_quota_and_gives_no_wrong_page(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = Random(seed)
    folder = Folder(tmp_path_factory.mktemp("pages"), pages=4)
    for _ in range(60):
        key = random.choice(KEYS)
        match random.randrange(6):
            case 0 | 1:
                folder.put(key)
            case 2 | 3:
                folder.get(key)
            case 4 if folder.file(key).exists():
                raw = bytearray(folder.file(key).read_bytes())
                raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
                folder.file(key).write_bytes(raw[: random.choice([len(raw), random.randrange(len(raw))])])
            case 5 if folder.file(key).exists():
                folder.file(key).rename(folder.path / "x")
                other = folder.file(random.choice(KEYS))
                other.parent.mkdir(exist_ok=True)
                (folder.path / "x").rename(other)
        assert folder.tier.bytes <= 4 * ON_DISK
    folder.guard.close()
