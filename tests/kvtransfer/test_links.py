"""What a link does between the protocol and the system: writes, credits while it copies, what it counts."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import pytest
from support.kv_world import World, eventually, no_kv_threads

from baton_common.errors import BatonError
from baton_kvtransfer import Receipt
from baton_kvtransfer.channel import SocketChannel
from baton_kvtransfer.waker import Waker
from baton_proto.peer_pb2 import Alive, Commit, PeerMessage


@pytest.fixture(params=["shm", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()
    assert no_kv_threads()


def pair_rate(world: World) -> float | None:
    labels = {"direction": "out", "peer": "d"}
    return world.sender.registry.get_sample_value("baton_kvtransfer_pair_bytes_per_second", labels)


def test_what_is_queued_leaves_in_one_write_and_in_order() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    writer = SocketChannel(ours, max_payload_bytes=64, stall_s=1.0)
    reader = SocketChannel(theirs, max_payload_bytes=64, stall_s=1.0)
    for name in ("a", "b"):
        writer.queue(PeerMessage(commit=Commit(transfer_id=name)))
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    writer.flush()
    writer.flush()
    packet = theirs.recv(4096, socket.MSG_PEEK)
    kinds = [message.WhichOneof("kind") for message in iter(lambda: reader.receive(lambda _message, _size: None), None)]
    assert kinds == ["commit", "commit"]
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    assert len(packet) > 2 * 16
    writer.queue(PeerMessage(alive=Alive()))
    writer.send(PeerMessage(commit=Commit(transfer_id="c")), memoryview(b"payload"))
    target = memoryview(bytearray(7))
    kinds = [
        message.WhichOneof("kind") for message in iter(lambda: reader.receive(lambda _message, _size: target), None)
    ]
    assert (kinds, bytes(target)) == (["alive", "commit"], b"payload")
    writer.close()
    reader.close()


def test_a_waker_wakes_once_and_again_after_it_was_cleared() -> None:
    waker = Waker()
    poll = select.poll()
    poll.register(waker.fileno(), select.POLLIN)
    for _ in range(2):
        assert not poll.poll(0)
        waker.wake()
        waker.wake()
        assert poll.poll(0)
        waker.clear()
    waker.clear()
    waker.close()


def test_waking_what_is_closed_meanwhile_touches_nobody_else() -> None:
    """The number of a closed descriptor is given to the next file: what is written late must not land there."""
    for _ in range(200):
        waker = Waker()
        late = threading.Thread(target=lambda waker=waker: [waker.wake() for _ in range(20)])
        late.start()
        waker.close()
        read, write = socket.socketpair()
        with read, write:
            late.join()
            for end in (read, write):
                end.setblocking(False)
                with pytest.raises(BlockingIOError):
                    end.recv(8)


def test_slots_are_credited_while_the_next_chunk_is_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver stands still in its third chunk; the sender goes on with the slots of the first two."""
    blocks = world.receiver.endpoint._local.blocks
    scatter, calls, go_on = blocks.scatter, [0], threading.Event()

    def slow(*arguments: object, **how: object) -> bool:
        calls[0] += 1
        if calls[0] == 3:
            assert go_on.wait(30)
        return scatter(*arguments, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "scatter", slow)
    run = world.send(0, 200)
    try:
        eventually(lambda: calls[0] == 3, "the third chunk is being copied")
        eventually(
            lambda: world.sender.metric("chunks_total", direction="out", wire=world.wire) >= 5, "a fifth of four slots"
        )
    finally:
        go_on.set()
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)


def test_a_pair_has_a_rate_while_its_link_is_up(world: World) -> None:
    def moving() -> bool:
        run = world.send(0, 100)
        assert isinstance(run.sent.wait(), Receipt)
        assert isinstance(run.received.wait(), Receipt)
        world.reuse(run)
        return (pair_rate(world) or 0.0) > 0.0

    eventually(moving, "bytes of the last second")
    eventually(lambda: pair_rate(world) == 0.0, "nothing moves any more")
    world.sender.endpoint.close()
    assert pair_rate(world) is None


def test_every_chunk_that_was_posted_is_timed(world: World) -> None:
    receipt = world.send(0, 100).sent.wait()
    assert isinstance(receipt, Receipt)
    assert world.sender.metric("posting_seconds_count", wire=world.wire) == receipt.chunks


@pytest.mark.parametrize("by", ["sender", "receiver"])
def test_an_abort_counts_once_on_each_side(world: World, by: str) -> None:
    assert isinstance(world.send(0, 20).sent.wait(), Receipt)
    run = world.start(0, 60)
    run.handle.ready(0, 2, 0, 60)
    eventually(lambda: run.received.receiving == 1, "the first chunk arrives")
    if by == "sender":
        run.handle.abort(BatonError("enough"))
    else:
        world.receiver.endpoint.cancel(run.transfer_id, BatonError("enough"))
    for side, direction in ((world.sender, "out"), (world.receiver, "in")):
        eventually(
            lambda side=side, direction=direction: side.metric("aborts_total", direction=direction) == 1, "counted"
        )
