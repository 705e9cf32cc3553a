"""`baton up` with real router and worker processes on a tiny random checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.support import alive
from support.checkpoints import tiny_checkpoint

from baton.ports import free_ports
from baton.state import state_dir

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]
BATON = Path(sys.executable).with_name("baton")


class House:
    """Runs `baton` with a state folder and a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "state"
        self.model = tiny_checkpoint("llama", folder / "tiny")
        [self.port] = free_ports(1, host="127.0.0.1", first=23000 + os.getpid() % 1000)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XDG_STATE_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(BATON), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=150
        )

    def up(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return self("up", str(self.model), "--detach", "--port", str(self.port), "--ready-timeout", "120", *flags)

    def pids(self) -> list[int]:
        """Supervisor first."""
        state = state_dir(self.home / "baton", "default").read()
        assert state is not None
        return [state.pid, *(process.pid for process in state.processes if process.pid)]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made("down")


def test_a_service_starts_answers_and_stops_and_leaves_nothing(house: House) -> None:
    started = house.up()
    assert started.returncode == 0, started.stderr
    assert f"baton: ready: http://127.0.0.1:{house.port}" in started.stdout
    assert "curl " in started.stdout
    pids = house.pids()
    assert len(pids) == 4
    assert all(alive(pid) for pid in pids)

    again = house.up()
    assert again.returncode == 0
    assert "is running already" in again.stdout
    assert house.pids() == pids

    status = house("status")
    assert status.returncode == 0
    assert re.search(r"^decode-0 +serving", status.stdout, re.MULTILINE)
    answer = house("chat", "--once", "a question that is long enough to be handed over " * 4, "--max-tokens", "6")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"TTFT \d+ ms · .*6 tokens · prompt \d+, cached 0", answer.stderr)
    assert re.search(r"^prefill-0 +decode-0 +up +shm", house("status").stdout, re.MULTILINE)

    assert house("down").returncode == 0
    assert not any(alive(pid) for pid in pids)


def test_kill_9_of_a_worker_is_repaired_and_of_the_supervisor_ends_all(house: House) -> None:
    assert house.up("--colocated", "1").returncode == 0
    supervisor, router, worker = house.pids()
    os.kill(worker, signal.SIGKILL)
    deadline_s = time.monotonic() + 90
    while house("status").returncode != 0 or house.pids()[2] == worker:
        assert time.monotonic() < deadline_s, "the worker did not come back"
        time.sleep(0.2)
    assert house("chat", "--once", "hello", "--max-tokens", "2").returncode == 0
    left = [router, house.pids()[2]]
    os.kill(supervisor, signal.SIGKILL)
    while any(alive(pid) for pid in left):
        assert time.monotonic() < deadline_s, "processes outlived their supervisor"
        time.sleep(0.05)
    assert house("down").stdout == "baton: no service is running\n"


@pytest.mark.parametrize(("missing", "words"), [("tokenizer.json", "tokenizer"), ("model.safetensors", "safetensors")])
def test_a_broken_checkpoint_is_refused_in_one_line(house: House, missing: str, words: str) -> None:
    (house.model / missing).unlink()
    started = house.up()
    assert started.returncode == 2
    [line] = started.stderr.splitlines()
    assert "refuses to start" in line
    assert words in line
    assert "Traceback" not in line
