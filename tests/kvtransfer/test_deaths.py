"""A peer is killed in every state of the protocol, on both sides; the survivor hears it, has all back, goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from support.kv_processes import PAGES_USED, TOKENS, Process, order_to_send, receive_from, send_to
from support.kv_victim import serve
from support.kv_wires import ONESIDED, needs
from support.kv_world import LAYOUT, Side, World, eventually, positions

from baton_common.errors import BatonError
from baton_kvtransfer import Receipt
from baton_kvtransfer.errors import KVTransferError
from baton_kvtransfer.protocol import ReceiveState, SendState

VALUE = 7.0
"""In every cell of a victim's pool."""
MAY_BE_OVER = {SendState.SENT, SendState.RELEASED}
"""The receiver may have committed before the sender dies."""
WAYS = [
    *((wire, moment) for wire in ("shm", "tcp") for moment in ("entered", "said")),
    *(pytest.param((wire, "said"), marks=[*needs(wire), pytest.mark.slow]) for wire in ONESIDED),
]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Wire, moment."""
    return request.param


@pytest.fixture
def moment(way: tuple[str, str]) -> str:
    return way[1]


@pytest.fixture
def world(way: tuple[str, str]) -> Iterator[World]:
    made = World(way[0])
    yield made
    made.close()


def victim(world: World, state: str, moment: str) -> Process:
    return Process("other", "other-1", world.wire, state, moment, target=serve)


def died(process: Process) -> None:
    assert process.exit_code() == -signal.SIGKILL, "the state was never reached"
    process.end()


def has_no_link(side: Side) -> None:
    eventually(lambda: not side.endpoint._links, "the link is gone, and its slots with it")
    assert side.metric("links", direction="in") == side.metric("links", direction="out") == 0
    assert side.metric("free_slots") == 0
    assert all(info.transfers == 0 for info in side.endpoint.peers())


@pytest.mark.parametrize("state", SendState, ids=lambda state: state.value)
def test_a_sender_dies(world: World, state: SendState, moment: str) -> None:
    other = victim(world, f"sender {state.value}", moment)
    other.tell(do="fill", value=VALUE)
    assert other.hear() == {"filled": VALUE}
    run = world.start(0, TOKENS, address="tcp://127.0.0.1:9", incarnation="nobody")
    run.sent.wait()
    gives_up = state in (SendState.ABORTING, SendState.DRAINED)
    order_to_send(world, other, run, everything=not gives_up and state is not SendState.PREFILLING)
    if gives_up:
        eventually(lambda: run.received.receiving == 1, "chunks arrive")
        other.tell(do="abort", id=run.transfer_id)
    died(other)
    if state is SendState.QUEUED and moment == "entered":  # nobody ever came: only the deadline would end it
        fence = world.receiver.endpoint.cancel(run.transfer_id, BatonError("nobody came"))
        assert fence.done()
    else:
        outcome = run.received.wait()
        if isinstance(outcome, Receipt):
            assert state in MAY_BE_OVER
            arrived = positions(world.receiver.pool, run.receiver_pages, 0, TOKENS)
            assert bool((arrived == VALUE).all())
        else:
            assert isinstance(outcome, BatonError)
    assert run.received.count <= 1
    has_no_link(world.receiver)
    world.reuse(run)
    successor_sends(world)
    world.check_canaries()


def successor_sends(world: World) -> None:
    again = Process("other", "other-2", world.wire)
    try:
        again.tell(do="fill", value=VALUE)
        assert again.hear() == {"filled": VALUE}
        run = receive_from(world, again, everything=True)
        assert isinstance(run.received.wait(), Receipt)
        arrived = positions(world.receiver.pool, run.receiver_pages, 0, TOKENS)
        assert bool((arrived == VALUE).all())
    finally:
        again.end()
    honest = world.send(0, 60)
    assert isinstance(honest.received.wait(), Receipt)
    world.check_arrived(honest)


@pytest.mark.parametrize("state", ReceiveState, ids=lambda state: state.value)
def test_a_receiver_dies(world: World, state: ReceiveState, moment: str) -> None:
    other = victim(world, f"receiver {state.value}", moment)
    transfer_id = world.next_id()
    other.tell(do="expect", id=transfer_id, pages=PAGES_USED, tokens=TOKENS)
    if state is ReceiveState.NEW:
        died(other)
    else:
        assert other.hear() == {"expected": transfer_id}
    run = world.start(0, TOKENS, expect=False, address=other.address, incarnation=other.incarnation)
    gives_up = state in (ReceiveState.ABORTING, ReceiveState.DRAINED)
    run.handle.ready(0, LAYOUT.layers if not gives_up else 2, 0, TOKENS)
    if gives_up:
        eventually(lambda: sum(info.bytes for info in world.sender.endpoint.peers()) > 0, "chunks left")
        other.tell(do="cancel", id=transfer_id)
    else:
        run.finish()
    if state is not ReceiveState.NEW:
        died(other)
    outcome = run.sent.wait()
    if isinstance(outcome, Receipt):
        assert state in (ReceiveState.VERIFIED, ReceiveState.COMMITTED)
        assert moment == "said"
    else:
        assert isinstance(outcome, KVTransferError)
    assert run.sent.count == 1
    assert run.handle.gate.done(), "the pages are the owner's again"
    has_no_link(world.sender)
    successor_receives(world)


def successor_receives(world: World) -> None:
    again = Process("other", "other-2", world.wire)
    try:
        run = send_to(world, again, everything=True)
        run.finish()
        assert isinstance(run.sent.wait(), Receipt)
        back = receive_from(world, again, everything=True)
        assert isinstance(back.received.wait(), Receipt)
        arrived = positions(world.receiver.pool, back.receiver_pages, 0, TOKENS)
        assert torch.equal(arrived, run.wanted)
    finally:
        again.end()
