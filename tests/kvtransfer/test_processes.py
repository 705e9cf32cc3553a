"""Real processes that die, freeze and come back."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
import torch
from support.kv_processes import TOKENS, Process, receive_from, send_to
from support.kv_wires import ONESIDED, over
from support.kv_world import LAYOUT, Side, World, eventually, positions

from baton_kvtransfer import Receipt
from baton_kvtransfer.errors import DeadlineExceeded, KVTransferError, PeerGone

WIRES = over("shm", "tcp", *ONESIDED)
SILENT = (PeerGone, DeadlineExceeded)  # the silence of the link, or of the transfer, which begins a moment earlier
RESET_S, SILENCE_S = 0.2, 3.5
"""Goals on a machine that has nothing else to do; tests run on others, too."""


@pytest.fixture(params=WIRES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()


@pytest.fixture
def receiver(world: World) -> Iterator[Process]:
    process = Process("other", "other-1", world.wire)
    yield process
    process.end()


@pytest.fixture
def sender(world: World) -> Iterator[Process]:
    process = Process("other", "other-1", world.wire)
    yield process
    process.end()


def test_bytes_cross_to_another_process_and_back(world: World, receiver: Process) -> None:
    run = send_to(world, receiver, everything=True)
    run.finish()
    assert isinstance(run.sent.wait(), Receipt)
    back = receive_from(world, receiver, everything=True)
    assert receiver.hear() == {"ended": "Receipt", "ok": True}
    assert isinstance(back.received.wait(), Receipt)
    assert torch.equal(positions(world.receiver.pool, back.receiver_pages, 0, TOKENS), run.wanted)


def test_a_killed_receiver_is_an_error_at_once(world: World, receiver: Process) -> None:
    run = send_to(world, receiver, everything=False)
    eventually(lambda: link_bytes(world.sender) > 0, "chunks left")
    receiver.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    error = run.sent.wait()
    assert isinstance(error, PeerGone)
    took("a killed receiver", run.sent.at_s - killed_s, goal_s=RESET_S)
    assert (error.transfer_id, error.peer) == (run.transfer_id, "other")
    assert run.handle.gate.done()


def test_a_killed_sender_is_an_error_at_once(world: World, sender: Process) -> None:
    run = receive_from(world, sender, everything=False)
    eventually(lambda: run.received.receiving == 1, "chunks arrive")
    sender.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    assert isinstance(run.received.wait(), PeerGone)
    took("a killed sender", run.received.at_s - killed_s, goal_s=RESET_S)


@pytest.mark.slow
def test_a_stopped_receiver_is_an_error_after_three_heartbeats(world: World, receiver: Process) -> None:
    run = send_to(world, receiver, everything=False)
    eventually(lambda: link_bytes(world.sender) > 0, "chunks left")
    receiver.signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    run.handle.ready(2, LAYOUT.layers, 0, TOKENS)
    run.finish()
    assert isinstance(run.sent.wait(), SILENT)
    took("a stopped receiver", run.sent.at_s - stopped_s, goal_s=SILENCE_S)
    assert run.handle.gate.done()


@pytest.mark.slow
def test_a_stopped_sender_is_fenced_and_cannot_write_when_it_wakes(world: World, sender: Process) -> None:
    run = receive_from(world, sender, everything=False)
    eventually(lambda: run.received.receiving == 1, "chunks arrive")
    sender.signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    assert isinstance(run.received.wait(), SILENT)
    took("a stopped sender", run.received.at_s - stopped_s, goal_s=SILENCE_S)
    world.reuse(run)
    following = world.send(0, 60)  # slots of another peer, pages that may be the same
    assert isinstance(following.received.wait(), Receipt)
    sender.signal(signal.SIGCONT)
    assert sender.hear()["ok"] is False
    world.check_arrived(following)
    world.check_canaries()


def test_a_process_that_comes_back_under_its_name_is_a_new_peer(world: World, receiver: Process) -> None:
    run = send_to(world, receiver, everything=True)
    run.finish()
    assert isinstance(run.sent.wait(), Receipt)
    receiver.end()
    again = Process("other", "other-2", world.wire)
    try:
        stale = world.start(0, 20, expect=False, address=again.address, incarnation="other-1")
        error = stale.sent.wait()
        assert isinstance(error, KVTransferError)
        assert type(error).__name__ == "StalePeer"
        fresh = send_to(world, again, everything=True)
        fresh.finish()
        assert isinstance(fresh.sent.wait(), Receipt)
    finally:
        again.end()


def took(what: str, seconds: float, *, goal_s: float) -> None:
    print(f"{what}: an error after {seconds * 1e3:.0f} ms, goal {goal_s * 1e3:.0f} ms")
    assert seconds < 3 * goal_s + 1.0


def link_bytes(side: Side) -> int:
    return sum(info.bytes for info in side.endpoint.peers())
