"""Peers that mean harm, after a good hello: a typed end of their own link, bounded memory; nobody else is touched."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from kvtransfer.test_peers import dial, frame, hello, is_closed
from support.kv_processes import ANSWER_S, Process, send_to
from support.kv_world import World, eventually, no_kv_threads

from baton_kvtransfer import Receipt, TransferConfig
from baton_kvtransfer.errors import KVTransferError
from baton_kvtransfer.transport import Address
from baton_proto.common_pb2 import Error
from baton_proto.peer_pb2 import (
    Alive,
    Chunk,
    Commit,
    Credit,
    Drained,
    Granted,
    PeerAbort,
    PeerMessage,
    PeerRefused,
    PeerWelcome,
    Pull,
    Resend,
    Reserve,
    Sent,
    Slot,
)

FLOOD_BYTES = 5 << 20
GROWTH_BYTES = 40 << 20
"""Far above what a link needs, far below what a flood that is kept would take."""
PATIENT = {"alive_interval_s": 5.0, "answer_timeout_s": 30.0}
"""A flood costs time on a machine with few cores; silence is not what is tested here."""


@pytest.fixture
def world() -> Iterator[World]:
    made = World("tcp")
    yield made
    made.close()
    assert no_kv_threads()


def half_done(world: World) -> Callable[[], None]:
    """An honest transfer on its way; the call ends it and looks at its bytes."""
    run = world.start(0, 60)
    run.handle.ready(0, 4, 0, 20)

    def finish() -> None:
        run.handle.ready(0, 4, 20, 60)
        run.finish()
        assert isinstance(run.received.wait(), Receipt)
        world.check_arrived(run)

    return finish


# ---- against a receiver ---------------------------------------------------------------------------------------------
OUT_OF_TURN = {
    "welcome": PeerMessage(welcome=PeerWelcome(worker_id="x")),
    "refused": PeerMessage(refused=PeerRefused()),
    "granted": PeerMessage(granted=Granted(transfer_id="x")),
    "credit": PeerMessage(credit=Credit(slots=[Slot(index=0, generation=2)])),
    "commit": PeerMessage(commit=Commit(transfer_id="x")),
    "resend": PeerMessage(resend=Resend(transfer_id="x", sequences=[0], round=1)),
    "hello again": hello(),
    "missing slot that never was": PeerMessage(alive=Alive(slots=[Slot(index=4096, generation=1)])),
    "chunk for a slot that never was": PeerMessage(chunk=Chunk(transfer_id="x", slot=Slot(index=4096), bytes=8)),
}


@pytest.mark.parametrize("message", OUT_OF_TURN.values(), ids=OUT_OF_TURN)
def test_what_a_sender_may_not_say_ends_its_link_alone(world: World, message: PeerMessage) -> None:
    finish = half_done(world)
    with dial(world) as sock:
        sock.sendall(frame(hello()) + frame(message))
        assert is_closed(sock)
    eventually(lambda: [info.state for info in peers(world, "mallory")] == ["gone"], "the owner sees it")
    assert peers(world, "mallory")[0].reason
    finish()


def peers(world: World, name: str) -> list[object]:
    return [info for info in world.receiver.endpoint.peers() if info.worker_id == name]  # type: ignore[return-value]


BROKEN = {
    "giant message": struct.pack("<IIQ", 2**32 - 1, 0, 0),
    "giant payload": struct.pack("<IIQ", 4, 2**32 - 1, 0) + b"abcd",
    "wrong check": b"\1\0\0\0" + b"\0" * 12 + b"x",
    "payload where none belongs": frame(PeerMessage(alive=Alive()), b"x" * 64),
    "chunk of other size than its payload": frame(
        PeerMessage(chunk=Chunk(transfer_id="x", slot=Slot(index=0, generation=1), bytes=4096)), b"x" * 64
    ),
    **{f"random {seed}": Random(seed).randbytes(5000) for seed in range(8)},
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_frames_after_a_good_hello_end_their_link_alone(world: World, data: bytes) -> None:
    finish = half_done(world)
    with dial(world) as sock:
        sock.sendall(frame(hello()))
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        assert is_closed(sock)
    finish()


def test_a_frame_cut_at_any_byte_is_only_the_end_of_its_link(world: World) -> None:
    whole = frame(PeerMessage(reserve=Reserve(transfer_id="unknown", end_token=40, heads=2)))
    finish = half_done(world)
    for cut in range(0, len(whole), 3):
        with dial(world) as sock:
            sock.sendall(frame(hello()) + whole[:cut])
    finish()
    eventually(lambda: all(info.worker_id == "p" for info in up(world)), "their links are gone")


def up(world: World) -> list[object]:
    return [info for info in world.receiver.endpoint.peers() if info.state == "up"]  # type: ignore[return-value]


FLOODS = {
    "reservations nobody expects": PeerMessage(reserve=Reserve(transfer_id="unknown", end_token=16, heads=2)),
    "pulls": PeerMessage(
        pull=Pull(transfer_id="t", ticket="k", page_tokens=16, end_token=16, peer_address="tcp://x:1")
    ),
    "endings": PeerMessage(sent=Sent(transfer_id="unknown", chunks=2**31, bytes=2**60)),
    "aborts": PeerMessage(abort=PeerAbort(transfer_id="unknown", error=Error(message="x" * 1000))),
    "names": PeerMessage(alive=Alive(transfer_ids=[f"name-{number}" for number in range(5000)])),
    "answers to nothing": PeerMessage(drained=Drained(transfer_id="unknown")),
    "late chunks": PeerMessage(chunk=Chunk(transfer_id="unknown", slot=Slot(index=0, generation=0), bytes=16)),
}


@pytest.fixture(scope="module")
def victim() -> Iterator[Process]:
    process = Process("other", "other-1", "tcp", PATIENT)
    yield process
    process.end()


def memory_bytes(process: Process, field: str) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(field))


@pytest.mark.parametrize(
    ("message", "reads"),
    [
        *(pytest.param(message, True, id=name) for name, message in FLOODS.items()),
        pytest.param(FLOODS["pulls"], False, id="pulls whose answers nobody reads"),
    ],
)
def test_a_flood_costs_no_memory_and_no_other_link(victim: Process, message: PeerMessage, reads: bool) -> None:
    world = World("tcp", sender_config=TransferConfig(wire="tcp", slot_bytes=4096, **PATIENT))
    before = memory_bytes(victim, "VmRSS")
    address = Address.parse(victim.address)
    run = send_to(world, victim, everything=False)
    greeting = hello()
    greeting.hello.target_incarnation = victim.incarnation
    with socket.create_connection((address.host, address.port), timeout=20) as sock:
        sock.sendall(frame(greeting))
        reader = threading.Thread(target=drain, args=(sock,))
        if reads:
            reader.start()
        one = frame(message, b"x" * message.chunk.bytes)
        bunch = one * max(1, (1 << 16) // len(one))
        with contextlib.suppress(OSError):  # one that reads nothing is cut in the end
            for _ in range(FLOOD_BYTES // len(bunch)):
                sock.sendall(bunch)
        run.handle.ready(2, 4, 0, run.end_token)
        run.finish()
        assert isinstance(run.sent.wait(ANSWER_S), Receipt), "the honest link goes on"
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        if reads:
            reader.join()
    assert memory_bytes(victim, "VmHWM") < before + GROWTH_BYTES
    world.close()


def drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


# ---- against a sender -----------------------------------------------------------------------------------------------
def welcome(**fields: object) -> PeerMessage:
    good: dict[str, object] = {
        "worker_id": "mallory", "incarnation": "m", "wire": "tcp", "digest": "xxh3_64", "payload": "bfloat16",
        "slot_bytes": 4096, "slots": [Slot(index=0, generation=1), Slot(index=1, generation=1)],
    }  # fmt: skip
    return PeerMessage(welcome=PeerWelcome(**{**good, **fields}))  # type: ignore[arg-type]


BAD_WELCOMES = {
    "another wire": frame(welcome(wire="nixl")),
    "no wire": frame(welcome(wire="")),
    "another digest": frame(welcome(digest="md5")),
    "another payload": frame(welcome(payload="int8")),
    "no slots": frame(welcome(slots=[])),
    "too many slots": frame(welcome(slots=[Slot(index=index, generation=1) for index in range(5000)])),
    "slots of nothing": frame(welcome(slot_bytes=0)),
    "slots too large": frame(welcome(slot_bytes=2**32 - 1)),
    "grant first": frame(PeerMessage(granted=Granted(transfer_id="x"))),
    "garbage": b"\xff" * 64,
    "refusal without a word": frame(PeerMessage(refused=PeerRefused())),
}
BAD_ANSWERS = {
    "credit for a slot that never was": PeerMessage(credit=Credit(slots=[Slot(index=99, generation=5)])),
    "commit before all was sent": PeerMessage(commit=Commit(transfer_id="{id}")),
    "chunk": PeerMessage(chunk=Chunk(transfer_id="{id}")),
    "reserve": PeerMessage(reserve=Reserve(transfer_id="{id}")),
    "sent": PeerMessage(sent=Sent(transfer_id="{id}")),
    "welcome again": welcome(),
    "nothing": PeerMessage(),
}


class Liar:
    """A receiver that answers a hello with the given bytes, and then waits for the end."""

    def __init__(self, answer: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def _serve(self) -> None:
        sock, _ = self._server.accept()
        with sock:
            sock.recv(1 << 16)
            sock.sendall(self._answer)
            drain(sock)

    def close(self) -> None:
        self._thread.join()
        self._server.close()


def lied_to(world: World, answer: bytes) -> KVTransferError:
    finish = half_done(world)
    liar = Liar(answer)
    run = world.start(0, 60, expect=False, address=liar.address, incarnation="m")
    run.announce()
    error = run.sent.wait()
    assert isinstance(error, KVTransferError)
    assert error.transfer_id == run.transfer_id
    assert run.handle.gate.done()
    liar.close()
    finish()
    return error


@pytest.mark.parametrize("answer", BAD_WELCOMES.values(), ids=BAD_WELCOMES)
def test_a_welcome_that_makes_no_sense_is_a_typed_error(world: World, answer: bytes) -> None:
    assert lied_to(world, answer).message


@pytest.mark.parametrize("message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_receiver_that_breaks_the_rules_ends_its_link_alone(world: World, message: PeerMessage) -> None:
    field = message.WhichOneof("kind")
    told = PeerMessage()
    told.CopyFrom(message)
    if field in ("commit", "chunk", "reserve", "sent"):  # about the transfer that `lied_to` makes, the second one
        getattr(told, field).transfer_id = f"{world.receiver.incarnation}-2"
    assert lied_to(world, frame(welcome()) + frame(told)).message
