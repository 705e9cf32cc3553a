"""Who gets in: compatibility, incarnations, capacity; and what strangers cannot do."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from support.kv_world import COMPAT, Side, World, eventually, no_kv_threads

from baton_common.errors import ErrorKind
from baton_kvtransfer import Receipt, TransferConfig
from baton_kvtransfer.channel import SocketChannel
from baton_kvtransfer.errors import LayoutMismatch, NoSlots, PeerGone, StalePeer, WireError
from baton_kvtransfer.transport import Address
from baton_kvtransfer.wires.choice import host_id
from baton_proto.common_pb2 import Compat
from baton_proto.compat import CONVERTED
from baton_proto.peer_pb2 import Alive, Chunk, PeerHello, PeerMessage, Reserve, Slot


@pytest.fixture(params=["shm", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()
    assert no_kv_threads()


def changed(field: str) -> Compat:
    compat = Compat()
    compat.CopyFrom(COMPAT)
    value = getattr(compat, field)
    setattr(compat, field, value + "x" if isinstance(value, str) else value + 1)
    return compat


def refused(side: Side) -> bool:
    return [info.state for info in side.endpoint.peers()] == ["refused"]


FIELDS = [field.name for field in Compat.DESCRIPTOR.fields]


@pytest.mark.parametrize("field", sorted(CONVERTED))
def test_a_difference_that_the_transfer_bridges_is_none(field: str) -> None:
    """What becomes of unequal pools themselves is in test_unequal.py."""
    world = World("tcp")
    other = world.side("other", world.config, compat=changed(field))
    run = world.start(0, 20, sender=other)
    run.announce()
    run.finish()
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)
    other.endpoint.close()
    world.close()


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in CONVERTED])
def test_a_difference_in_any_other_field_is_refused_by_name_on_both_sides(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World("tcp")
    with caplog.at_level(logging.WARNING):
        other = world.side("other", world.config, compat=changed(field))
        run = world.start(0, 20, sender=other)
        error = run.sent.wait()
        eventually(lambda: refused(world.receiver), "the receiver remembers")
        eventually(lambda: refused(other), "the sender remembers")
    assert isinstance(error, LayoutMismatch)
    assert (error.field, error.kind) == (field, ErrorKind.INCOMPATIBLE)
    assert error.ours == str(getattr(changed(field), field))
    assert error.theirs == str(getattr(COMPAT, field))
    (theirs,) = world.receiver.endpoint.peers()
    for info in (theirs, other.endpoint.peers()[0]):
        assert info.state == "refused"
        assert field in info.reason
        assert error.theirs in info.reason
    assert field in caplog.text
    other.endpoint.close()
    world.close()


def test_a_ticket_of_a_former_incarnation_is_refused(world: World) -> None:
    run = world.start(0, 20, incarnation="d-0")
    error = run.sent.wait()
    assert isinstance(error, StalePeer)
    assert "d-0" in error.message
    assert error.kind.retriable


def test_a_worker_that_comes_back_replaces_itself_and_the_old_one_stays_out(world: World) -> None:
    first = world.send(0, 20)
    assert isinstance(first.received.wait(), Receipt)
    hanging = world.start(0, 40)
    hanging.handle.ready(0, 4, 0, 20)
    again = world.side("p", world.config, incarnation="p-2")
    second = world.start(0, 20, sender=again)
    second.announce()
    second.finish()
    assert isinstance(second.received.wait(), Receipt)
    assert isinstance(hanging.sent.wait(), Exception)
    third = world.start(0, 20)
    third.announce()
    error = third.sent.wait()
    assert isinstance(error, StalePeer)
    again.endpoint.close()


def test_a_broken_link_is_replaced_by_the_next_transfer(world: World) -> None:
    run = world.send(0, 20)
    assert isinstance(run.received.wait(), Receipt)
    (link,) = world.receiver.endpoint._links
    link.stop()
    eventually(lambda: not world.receiver.endpoint._links, "the link ends")
    eventually(lambda: not world.sender.endpoint._links, "the other end, too")
    assert world.sender.endpoint.peers()[0].state == "gone"
    following = world.send(0, 20)
    assert isinstance(following.received.wait(), Receipt)
    world.check_arrived(following)


def test_more_peers_than_slots_for_them_are_told_what_to_raise() -> None:
    config = TransferConfig(slot_bytes=4096, max_peers=1)
    world = World("shm", sender_config=config, receiver_config=config)
    assert isinstance(world.send(0, 20).received.wait(), Receipt)
    other = world.side("q", config)
    error = world.start(0, 20, sender=other).sent.wait()
    assert isinstance(error, NoSlots)
    assert "max_peers" in error.message
    assert error.retry_after_ms > 0
    other.endpoint.close()
    world.close()


def test_one_host_shares_memory_and_tells_why() -> None:
    world = World("shm")
    world.send(0, 20).received.wait()
    (info,) = world.sender.endpoint.peers()
    assert (info.wire, info.reason.split(";")[0]) == ("shm", "same host")
    world.close()


def test_another_host_gets_tcp() -> None:
    world = World("shm")
    address = Address.parse(world.receiver.address)
    assert address.host_id == host_id()
    elsewhere = str(Address(host=address.host, port=address.port, unix=address.unix, host_id="elsewhere"))
    run = world.start(0, 20, address=elsewhere)
    run.announce()
    run.finish()
    receipt = run.received.wait()
    assert isinstance(receipt, Receipt)
    assert receipt.wire == "tcp"
    world.close()


def test_insisting_on_shm_with_another_host_is_an_error_that_says_so() -> None:
    config = TransferConfig(wire="shm", slot_bytes=4096)
    world = World("shm", sender_config=config)
    address = Address.parse(world.receiver.address)
    run = world.start(0, 20, address=str(Address(host=address.host, port=address.port)))
    error = run.sent.wait()
    assert isinstance(error, WireError)
    assert "wire is set to shm" in error.message
    world.close()


def test_a_port_in_use_is_named() -> None:
    world = World("tcp")
    port = Address.parse(world.receiver.address).port
    with pytest.raises(WireError, match=f"127.0.0.1:{port}"):
        world.side("x", TransferConfig(listen=f"127.0.0.1:{port}", wire="tcp"))
    world.close()


def test_an_advertised_host_is_what_peers_dial() -> None:
    world = World("tcp")
    side = world.side("y", TransferConfig(listen="0.0.0.0:0", advertise="10.1.2.3", wire="tcp"))
    assert Address.parse(side.address).host == "10.1.2.3"
    side.endpoint.close()
    world.close()


# ---- strangers ------------------------------------------------------------------------------------------------------
def dial(world: World) -> socket.socket:
    address = Address.parse(world.receiver.address)
    if world.wire == "tcp":
        return socket.create_connection((address.host, address.port), timeout=5)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect("\0" + address.unix)
    return sock


def frame(message: PeerMessage, payload: bytes = b"") -> bytes:
    body = message.SerializeToString()
    return struct.pack("<IIQ", len(body), len(payload), xxhash.xxh3_64_intdigest(body, len(payload))) + body + payload


def hello() -> PeerMessage:
    return PeerMessage(
        hello=PeerHello(
            protocol_version=1,
            worker_id="mallory",
            incarnation="m",
            compat=COMPAT,
            wires=["shm", "tcp"],
            digests=["xxh3_64"],
            payloads=["bfloat16"],
            host_id=host_id(),
            target_incarnation="d-1",
        )
    )


def is_closed(sock: socket.socket) -> bool:
    """Whatever was said before, the connection ends."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0" * 64,
    b"\xff" * 64,
    struct.pack("<IIQ", 2**32 - 1, 0, 0),
    struct.pack("<IIQ", 4, 2**32 - 1, 0) + b"abcd",
    struct.pack("<IIQ", 4, 0, xxhash.xxh3_64_intdigest(b"\xff\xff\xff\xff", 0)) + b"\xff\xff\xff\xff",
    frame(PeerMessage(alive=Alive())),
    frame(PeerMessage()),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_instead_of_a_hello_ends_only_its_own_connection(world: World, garbage: bytes) -> None:
    with dial(world) as sock:
        sock.sendall(garbage)
        assert is_closed(sock)
    run = world.send(0, 20)
    assert isinstance(run.received.wait(), Receipt)


HOSTILE = [
    PeerMessage(reserve=Reserve(transfer_id="guess")),  # answered with Abort, harmless: the next one ends the link
    PeerMessage(chunk=Chunk(transfer_id="x", slot=Slot(index=999, generation=1))),
    PeerMessage(chunk=Chunk(transfer_id="x", slot=Slot(index=0, generation=1), bytes=2**40)),
    PeerMessage(hello=PeerHello(worker_id="mallory")),
    PeerMessage(),
]


@pytest.mark.parametrize("message", HOSTILE, ids=range(len(HOSTILE)))
def test_a_peer_that_breaks_the_rules_ends_only_its_own_link(world: World, message: PeerMessage) -> None:
    run = world.start(0, 40)
    run.handle.ready(0, 4, 0, 20)
    with dial(world) as sock:
        sock.sendall(frame(hello()) + frame(message) + frame(PeerMessage()))
        assert is_closed(sock)
    run.handle.ready(0, 4, 20, 40)
    run.finish()
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)


def test_a_reserved_transfer_rejects_blocks_that_are_not_its_own(world: World) -> None:
    run = world.start(0, 40, address=world.sender.address, incarnation=world.sender.incarnation)
    chunk = Chunk(
        transfer_id=run.transfer_id, layer_end=99, head_end=2, token_end=40, slot=Slot(index=0, generation=1), bytes=64
    )
    reserve = Reserve(transfer_id=run.transfer_id, first_token=0, end_token=40, heads=2)
    payload = bytes(64) if world.wire == "tcp" else b""
    with dial(world) as sock:
        sock.sendall(frame(hello()) + frame(PeerMessage(reserve=reserve)) + frame(PeerMessage(chunk=chunk), payload))
        error = run.received.wait()
    assert isinstance(error, WireError)
    assert "layers [0, 99) of 4" in error.message


def test_a_link_that_ends_inside_a_frame_fails_its_transfers(world: World) -> None:
    run = world.start(0, 40, address=world.sender.address, incarnation=world.sender.incarnation)
    reserve = Reserve(transfer_id=run.transfer_id, first_token=0, end_token=40, heads=2)
    with dial(world) as sock:
        sock.sendall(frame(hello()) + frame(PeerMessage(reserve=reserve)) + b"\x10\0\0\0")
        eventually(lambda: any(info.transfers for info in world.receiver.endpoint.peers()), "reserved")
    assert isinstance(run.received.wait(), PeerGone)


def test_a_connection_that_says_nothing_is_closed_in_time() -> None:
    world = World("tcp", receiver_config=TransferConfig(wire="tcp", slot_bytes=4096, connect_timeout_s=0.2))
    with dial(world) as sock:
        assert is_closed(sock)
    world.close()


def test_many_silent_connections_do_not_keep_others_out() -> None:
    config = TransferConfig(wire="tcp", slot_bytes=4096, max_peers=2, connect_timeout_s=0.5)
    world = World("tcp", receiver_config=config)
    silent = [dial(world) for _ in range(40)]
    eventually(lambda: len(world.receiver.endpoint._links) <= 18, "bounded")
    for sock in silent:
        sock.close()
    eventually(lambda: not world.receiver.endpoint._links, "gone")
    # those that nobody had accepted yet may still be in front of us: the sender hears of it, and comes again
    eventually(lambda: isinstance(world.send(0, 20).sent.wait(), Receipt), "served")
    world.close()


@given(data=st.binary(max_size=300))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_bytes_are_a_message_a_wait_or_a_typed_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours, max_payload_bytes=64, stall_s=1.0)
    theirs.sendall(data)
    try:
        channel.receive(lambda _message, size: None)
    except WireError:
        pass
    finally:
        channel.close()
        theirs.close()


@given(cut=st.integers(0, 400), payload=st.binary(min_size=1, max_size=64))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_frames_cut_anywhere_come_together(cut: int, payload: bytes) -> None:
    message = PeerMessage(chunk=Chunk(transfer_id="t", bytes=len(payload)))
    data = frame(message, payload) + frame(PeerMessage(alive=Alive(transfer_ids=["a"])))
    cut = min(cut, len(data))
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours, max_payload_bytes=64, stall_s=1.0)
    target = bytearray(64)
    got = []
    for part in (data[:cut], data[cut:]):
        if part:
            theirs.sendall(part)
        while (one := channel.receive(lambda _message, size: memoryview(target)[:size])) is not None:
            got.append(one)
    assert [one.WhichOneof("kind") for one in got] == ["chunk", "alive"]
    assert target[: len(payload)] == payload
    channel.close()
    theirs.close()


def test_a_peer_that_reads_nothing_does_not_block_for_ever() -> None:
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours, max_payload_bytes=1 << 20, stall_s=0.1)

    def flood() -> None:
        for _ in range(64):
            channel.send(PeerMessage(chunk=Chunk()), memoryview(bytes(1 << 20)))

    with pytest.raises(PeerGone, match="took nothing"):
        flood()
    channel.close()
    theirs.close()


def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    world = World("shm")
    before = len(os.listdir("/proc/self/fd"))
    with dial(world) as sock:
        read, write = os.pipe()
        socket.send_fds(sock, [frame(PeerMessage())], [read, write])
        os.close(read)
        os.close(write)
        assert is_closed(sock)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor leaks")
    world.close()


def test_threads_have_names_and_an_end() -> None:
    world = World("tcp")
    world.send(0, 20).received.wait()
    names = {thread.name.rsplit("-", 1)[0] for thread in threading.enumerate() if thread.name.startswith("baton-kv")}
    assert {"baton-kv-out-d", "baton-kv-in", "baton-kv"} <= names
    world.close()
    assert no_kv_threads()
