"""The transport probe against real workers: each wire it can prove, and what it says of transports that are broken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from router.conftest import eventually
from support.checkpoints import tiny_checkpoint
from support.processes import WorkerProcess

from baton_common.clock import SystemClock
from baton_router.checkpoint import load_checkpoint
from baton_router.fleet import Fleet
from baton_router.links import Link
from baton_router.probe import ProbeResult, probe

pytestmark = [pytest.mark.process, pytest.mark.slow]

DEADLINE_S = 30.0

# name -> (role, settings). 127.0.0.2 is this machine too, but nobody listens there.
WORKERS = {
    "prefill-any": ("prefill", {}),
    "prefill-tcp": ("prefill", {"wire": "tcp"}),
    "decode-any": ("decode", {}),
    "decode-far": ("decode", {"wire": "tcp", "peer_advertise": "127.0.0.2"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    processes: dict[str, WorkerProcess]
    vocab_size: int


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    folder: Path = tmp_path_factory.mktemp("probe")
    checkpoint = tiny_checkpoint("qwen3", folder / "tiny")
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(WorkerProcess(role, checkpoint, folder, name=name, worker_id=name, **settings))
            for name, (role, settings) in WORKERS.items()
        }
        for process in started.values():
            process.wait_ready()
        yield Pods(processes=started, vocab_size=load_checkpoint(str(checkpoint)).vocab_size)


@asynccontextmanager
async def linked(pods: Pods, *names: str) -> AsyncIterator[list[Link]]:
    fleet = Fleet([pods.processes[name].address for name in names], SystemClock())
    fleet.start()
    try:
        await eventually(lambda: all(link.up and link.load.total_pages for link in fleet.links), "links up", 30)
        yield list(fleet.links)
    finally:
        await fleet.stop()


async def ask(pods: Pods, prefill: str, decode: str) -> ProbeResult:
    async with linked(pods, prefill, decode) as (source, target):
        result = await probe(source, target, vocab_size=pods.vocab_size, deadline_s=DEADLINE_S)
        assert not source.open_legs
        assert not target.open_legs
        await eventually(lambda: not target.load.reserved and not target.load.running, "decode holds nothing", 30)
        return result


@pytest.mark.parametrize(
    ("prefill", "decode", "wire"), [("prefill-any", "decode-any", "shm"), ("prefill-tcp", "decode-any", "tcp")]
)
async def test_each_wire_is_proved_with_the_bytes_that_really_crossed(
    pods: Pods, prefill: str, decode: str, wire: str
) -> None:
    log = pods.processes[decode].records
    before = len(received(log()))
    result = await ask(pods, prefill, decode)
    assert result.ok, result.message
    (handed,) = received(log())[before:]
    assert (handed["wire"], handed["bytes"]) == (wire, result.bytes)
    assert result.bytes > 0


async def test_a_second_probe_finds_nothing_cached_on_either_side(pods: Pods) -> None:
    async with linked(pods, "prefill-any", "decode-any") as (source, target):
        results = [await probe(source, target, vocab_size=pods.vocab_size, deadline_s=DEADLINE_S) for _ in range(3)]
    assert [result.ok for result in results] == [True] * 3, results
    assert len({result.bytes for result in results}) == 1


def received(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [record for record in records if record["message"] == "KV received"]


async def test_a_broken_transport_is_a_failure_with_the_workers_own_reason(pods: Pods) -> None:
    result = await ask(pods, "prefill-tcp", "decode-far")
    assert result.verdict == "failed"
    assert "127.0.0.2" in result.message
    assert "waited" not in result.message, "it was told, long before the deadline"
