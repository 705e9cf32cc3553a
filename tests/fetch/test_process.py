"""The program as a pod runs it: killed, stopped, several at once, and what its last line and exit status say."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fetching import WAIT_S, contents, finish, start_fetch
from support.hub_server import HubServer
from support.s3_server import S3Server
from support.tcp_proxy import TcpProxy

MB = 1 << 20
SIZE, RATE = 14 * MB, 2 * MB    # slow enough that ranges are as small as they get
HOLD, LOST = 9 * MB, 6 * MB     # where the server stops talking; what is under way then, at most

pytestmark = pytest.mark.process


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def part_bytes(folder: Path) -> int:
    part = folder / ".baton-fetch" / "parts" / "model.safetensors.part"
    return part.stat().st_size if part.exists() else 0


@pytest.fixture
def large() -> dict[str, bytes]:
    return {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": random.Random(1).randbytes(SIZE)}


@pytest.fixture
def uploaded(s3: S3Server, bucket: str, large: dict[str, bytes]) -> str:
    for name, data in large.items():
        s3.put(bucket, f"m/{name}", data, checksum="SHA256")
    return f"s3://{bucket}/m"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_after_a_kill_the_next_start_goes_on_where_the_file_ended(
    s3: S3Server, uploaded: str, large: dict[str, bytes], tmp_path: Path, how: signal.Signals
) -> None:
    with TcpProxy(s3.port, bytes_per_s=RATE) as proxy:
        command = ("--uri", uploaded, "--endpoint", proxy.url, "--to", tmp_path)
        proxy.hold_after_bytes = HOLD
        first = start_fetch(*command, environment=s3.environment)
        wait_until(lambda: part_bytes(tmp_path) > HOLD - LOST, first)
        first.send_signal(how)
        status, output = finish(first)
        assert "model.safetensors" not in contents(tmp_path)
        if how is signal.SIGTERM:
            assert status == 1
            assert output.splitlines()[-1].startswith(f"baton-fetch: {uploaded}: stopped; what is fetched is kept")
            assert "Traceback" not in output
        proxy.hold_after_bytes = proxy.bytes_per_s = float("inf")
        status, output = finish(start_fetch(*command, environment=s3.environment))
        assert status == 0, output
        assert "verified 3 by sha256" in output
        assert contents(tmp_path) == large
        assert proxy.sent_bytes < SIZE + LOST    # HOLD more, had it begun anew


def test_two_at_once_fetch_once_and_a_router_does_not_wait_for_weights(
    s3: S3Server, uploaded: str, large: dict[str, bytes], tmp_path: Path
) -> None:
    with TcpProxy(s3.port) as proxy:
        command = ("--uri", uploaded, "--endpoint", proxy.url, "--to", tmp_path)
        proxy.hold_after_bytes = 4 * MB
        workers = [start_fetch(*command, environment=s3.environment)]
        wait_until(lambda: (tmp_path / "tokenizer.json").exists(), workers[0])
        workers.append(start_fetch(*command, environment=s3.environment))
        status, output = finish(start_fetch(*command, "--only-tokenizer", environment=s3.environment))
        assert (status, "model.safetensors" in contents(tmp_path)) == (0, False), output
        proxy.hold_after_bytes = float("inf")
        outputs = [finish(worker) for worker in workers]
        assert [status for status, _ in outputs] == [0, 0], outputs
        assert contents(tmp_path) == large
        assert proxy.sent_bytes < SIZE + MB
        assert sorted("nothing to fetch" in output for _, output in outputs) == [False, True]


def test_many_at_once_on_an_empty_folder_all_succeed(
    s3: S3Server, uploaded: str, large: dict[str, bytes], tmp_path: Path
) -> None:
    with TcpProxy(s3.port) as proxy:
        command = ("--uri", uploaded, "--endpoint", proxy.url, "--to", tmp_path)
        outputs = [finish(p) for p in [start_fetch(*command, environment=s3.environment) for _ in range(4)]]
        assert [status for status, _ in outputs] == [0] * 4, outputs
        assert contents(tmp_path) == large
        assert proxy.sent_bytes < SIZE + MB


def test_whoever_waits_takes_over_from_a_killed_one(
    s3: S3Server, uploaded: str, large: dict[str, bytes], tmp_path: Path
) -> None:
    with TcpProxy(s3.port, bytes_per_s=RATE) as proxy:
        command = ("--uri", uploaded, "--endpoint", proxy.url, "--to", tmp_path)
        proxy.hold_after_bytes = HOLD
        first = start_fetch(*command, environment=s3.environment)
        wait_until(lambda: part_bytes(tmp_path) > 0, first)
        second = start_fetch(*command, environment=s3.environment)
        first.kill()
        finish(first)
        proxy.hold_after_bytes = proxy.bytes_per_s = float("inf")
        status, output = finish(second)
        assert status == 0, output
        assert contents(tmp_path) == large
        assert "taking over from" in output


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (("--uri", "hf://nobody/nothing", "--endpoint", "{hub}"), 2,
         "baton-fetch: hf://nobody/nothing: not found or not public; check spec.model.uri, or give a token in "
         "credentialsSecret"),
        (("--uri", "ftp://host/model"), 2,
         "baton-fetch: ftp://host/model: not a place this program fetches from; use hf://owner/name, "
         "s3://bucket/prefix or baton://demo (pvc:// and file:// are not fetched, they are mounted)"),
        (("--uri", "baton://demo", "--revision", "v1"), 2,
         "baton-fetch: baton://demo: has no revisions; remove spec.model.revision or use hf://owner/name"),
    ],
)  # fmt: skip
def test_the_last_line_says_what_to_do(
    hub: HubServer, tmp_path: Path, arguments: tuple[str, ...], status: int, line: str
) -> None:
    filled = [argument.format(hub=hub.url) for argument in arguments]
    found, output = finish(start_fetch(*filled, "--to", tmp_path / "m", environment={"HOME": str(tmp_path)}))
    assert (found, output.splitlines()[-1]) == (status, line)


def test_nothing_is_written_outside_the_folder(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    """In a pod the root file system is read-only and HOME is a scratch folder."""
    hub.publish("acme/llama", files)
    home, target = tmp_path / "home", tmp_path / "target"
    home.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    environment = {"HOME": str(home), "TMPDIR": str(home), "HF_HOME": str(home / "hub")}
    process = start_fetch("--uri", "hf://acme/llama", "--endpoint", hub.url, "--to", target, environment=environment)
    status, output = finish(process)
    assert status == 0, output
    assert not os.listdir(home)


def test_a_full_disk_is_named_and_the_folder_is_resumable(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: the kernel refuses the write all the same."""
    program = f"ulimit -f 3000; exec '{sys.executable}' -m baton_fetch --uri baton://demo --to '{tmp_path}'"
    full = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == (
        f"baton-fetch: baton://demo: {tmp_path} is full; give the model volume more room; what is fetched is kept"
    )
    assert part_bytes(tmp_path) > 0
    status, output = finish(start_fetch("--uri", "baton://demo", "--to", tmp_path, environment={}))
    assert (status, "fetched 7.0 MB" in output) == (0, False), output


def test_the_demo_model_comes_with_the_program(tmp_path: Path) -> None:
    for said in ("verified 5 by sha256", "nothing to fetch"):
        status, output = finish(start_fetch("--uri", "baton://demo", "--to", tmp_path, environment={}))
        assert (status, said in output) == (0, True), output
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(contents(tmp_path))
    assert "training.json" not in contents(tmp_path)
