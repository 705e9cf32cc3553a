"""Whoever owns the folder: dead owners are replaced, living ones are not, and two who take over do not both win."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from baton_common.clock import SystemClock
from baton_fetch.lock import FolderLock

WAIT_S = 60.0


def make(path: Path, *, stale_s: float = 0.5, lost: threading.Event | None = None) -> FolderLock:
    return FolderLock(
        path, clock=SystemClock(), wait=time.sleep, lost=lost or threading.Event(), beat_s=0.05, stale_s=stale_s
    )


def foreign_record(path: Path, *, beat: int = 1) -> None:
    """Of a process on another node: its flock says nothing here."""
    record = {"owner": "pod-elsewhere", "token": "another", "kernel": "another kernel", "beat": beat}
    path.write_text(json.dumps(record))


def test_a_free_lock_is_taken_and_gone_after_the_release(tmp_path: Path) -> None:
    lock = make(tmp_path / "lock")
    assert lock.acquire(lambda: False)
    assert (tmp_path / "lock").exists()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_waiter_gets_it_when_the_owner_lets_go(tmp_path: Path) -> None:
    first, second = make(tmp_path / "lock", stale_s=WAIT_S), make(tmp_path / "lock", stale_s=WAIT_S)
    assert first.acquire(lambda: False)
    taken = threading.Event()
    waiter = threading.Thread(target=lambda: second.acquire(lambda: False) and taken.set())
    waiter.start()
    assert not taken.wait(0.3)
    first.release()
    assert taken.wait(WAIT_S)
    waiter.join()
    second.release()


def test_a_waiter_leaves_without_it_when_what_it_wanted_is_there(tmp_path: Path) -> None:
    foreign_record(tmp_path / "lock")
    assert not make(tmp_path / "lock", stale_s=WAIT_S).acquire(lambda: True)


def test_a_record_of_another_node_that_stands_still_is_taken_over(tmp_path: Path) -> None:
    foreign_record(tmp_path / "lock")
    lock = make(tmp_path / "lock")
    assert lock.acquire(lambda: False)
    assert "pod-elsewhere" not in (tmp_path / "lock").read_text()
    lock.release()


def test_a_record_of_another_node_that_moves_is_respected(tmp_path: Path) -> None:
    """Longer than the stale time: only the record's changes tell that its owner lives."""
    path, begun_s, seen = tmp_path / "lock", time.monotonic(), []
    foreign_record(path)

    def alive() -> bool:
        seen.append(time.monotonic())
        foreign_record(path, beat=len(seen))
        return time.monotonic() - begun_s > 2.0

    assert not make(path, stale_s=1.0).acquire(alive)


def test_an_owner_notices_that_it_was_replaced(tmp_path: Path) -> None:
    lost = threading.Event()
    lock = make(tmp_path / "lock", lost=lost)
    assert lock.acquire(lambda: False)
    foreign_record(tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "lock")
    assert lost.wait(WAIT_S)
    lock.release()
    assert "pod-elsewhere" in (tmp_path / "lock").read_text()     # not ours to remove


@pytest.mark.parametrize("waiters", [2, 5])
def test_of_several_who_take_over_one_wins(tmp_path: Path, waiters: int) -> None:
    foreign_record(tmp_path / "lock")
    inside, most, done = threading.Semaphore(1), [], []

    def run() -> None:
        lock = make(tmp_path / "lock", stale_s=2.0)
        assert lock.acquire(lambda: False)
        most.append(inside.acquire(blocking=False))
        time.sleep(0.2)
        inside.release()
        lock.release()
        done.append(True)

    threads = [threading.Thread(target=run) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (len(done), all(most)) == (waiters, True)
