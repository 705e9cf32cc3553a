"""Pulls: KV that the receiver of handoffs holds comes back to their sender, on every wire, or is known not to come."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
import torch
from kvtransfer.test_peers import dial, frame, hello
from support.kv_wires import ONESIDED, over
from support.kv_world import CANARY, LAYOUT, Outcome, Run, Side, World, eventually, no_kv_threads, positions
from support.kv_world import world as chaos_world

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_kvtransfer import Inbound, Outbound, Pull, PullOrder, Receipt, Transfer, TransferConfig
from baton_kvtransfer.channel import SocketChannel
from baton_kvtransfer.errors import Aborted, DeadlineExceeded, KVTransferError, PeerGone, PullDenied, StalePeer
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.pulling import Asked
from baton_kvtransfer.wires.chaos import Faults
from baton_proto.common_pb2 import Error
from baton_proto.peer_pb2 import Drained, PeerMessage, PullRefused
from baton_proto.peer_pb2 import Pull as PullMessage

SIZE = LAYOUT.page_tokens
HASH = PageHash(b"h" * 16)


@pytest.fixture(params=over("inproc", "shm", "tcp", *ONESIDED))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()
    assert no_kv_threads()


@dataclass
class Lent:
    """What `p` asks of `d`: positions [first, end) of a table that `d` has filled with random bytes."""

    world: World
    transfer_id: TransferId
    first: int
    end: int
    source: list[PageId]
    target: list[PageId]
    outcome: Outcome
    transfer: Transfer | None = None
    sent: Outcome | None = None

    def check_arrived(self) -> None:
        """Right bytes in the range, nothing outside it, and no token."""
        pool, wanted = self.world.sender.pool, positions(self.world.receiver.pool, self.source, self.first, self.end)
        assert torch.equal(positions(pool, self.target, self.first, self.end), wanted)
        for begin, end in ((0, self.first), (self.end, len(self.target) * SIZE)):
            assert bool((positions(pool, self.target, begin, end) == CANARY).all())
        assert self.outcome.first is None

    def open(self, order: PullOrder) -> Transfer:
        self.sent = Outcome()
        self.transfer = self.world.receiver.endpoint.open(
            Outbound(
                transfer_id=order.transfer_id, request_id=RequestId("lender"), peer_address=order.peer_address,
                peer_incarnation=order.peer_incarnation, pages=self.source, first_token=order.first_token,
                end_token=order.end_token, deadline_s=time.monotonic() + 30, done=self.sent.set,
            )
        )  # fmt: skip
        return self.transfer

    def send(self, order: PullOrder) -> None:
        """As a lender does; once, however often it is asked."""
        if self.transfer is None:
            transfer = self.open(order)
            transfer.ready(0, LAYOUT.layers, order.first_token, order.end_token)
            transfer.finish(None)


def lend(world: World, first: int = 2 * SIZE, end: int = 6 * SIZE, *, number: int = 0, deadline_s: float = 30.0
         ) -> Lent:  # fmt: skip
    """Expected by `p`, not asked for yet. `d` will send it when it is."""
    count = end // SIZE + 1
    source, target = world._take(world.receiver, count), world._take(world.sender, count)
    for page in source:
        world.receiver.pool[page] = torch.randint(-90, 90, LAYOUT.page_shape).to(torch.bfloat16)
    lent = Lent(world, TransferId(f"pull-{number}"), first, end, source, target, Outcome())
    world.sender.inbound[lent.transfer_id] = lent.outcome
    world.receiver.lend = lent.send
    world.sender.endpoint.expect(
        Inbound(
            transfer_id=lent.transfer_id, request_id=RequestId("asker"), pages=target, first_token=first, end_token=end,
            deadline_s=time.monotonic() + deadline_s,
        )
    )  # fmt: skip
    return lent


def ask(lent: Lent, *, incarnation: str = "", address: str = "") -> None:
    receiver = lent.world.receiver
    lent.world.sender.endpoint.pull(
        Pull(
            transfer_id=lent.transfer_id, ticket=TransferId("ticket"), peer_address=address or receiver.address,
            peer_incarnation=incarnation or receiver.incarnation, first_token=lent.first, end_token=lent.end,
            page_hash=HASH,
        )
    )  # fmt: skip


# ---- it comes back --------------------------------------------------------------------------------------------------
def test_the_bytes_come_back_without_a_token(world: World) -> None:
    lent = lend(world)
    ask(lent)
    receipt = lent.outcome.wait()
    assert isinstance(receipt, Receipt)
    lent.check_arrived()
    (order,) = world.receiver.pulls
    assert (order.ticket, order.page_hash, order.page_tokens, order.peer) == ("ticket", HASH, SIZE, "p")
    assert lent.sent is not None
    assert isinstance(lent.sent.wait(), Receipt)
    directions = sorted(info.direction for info in world.sender.endpoint.peers())
    assert directions == ["in", "out"]


def test_both_directions_at_once_and_again_after_a_restart(world: World) -> None:
    random = Random(4)
    for life in range(3):
        runs: list[Run] = []
        for number in range(8):
            runs.append(world.send(0, random.randrange(1, 60)))
            lent = lend(world, end=random.randrange(3, 5) * SIZE, number=10 * life + number)
            ask(lent)
            assert isinstance(lent.outcome.wait(), Receipt)
            lent.check_arrived()
        for run in runs:
            assert isinstance(run.received.wait(), Receipt)
            assert isinstance(run.sent.wait(), Receipt)
            world.check_arrived(run)
        # the asker comes back under its name, and is a sender and a receiver for its peer again
        world.sender.endpoint.close()
        world.sender = world.side("p", world.config, incarnation=f"p-{life + 2}")
        world.receiver.free = [PageId(page) for page in range(world.receiver.pool.shape[0])]
        world.receiver.pool[:] = CANARY


# ---- it does not ----------------------------------------------------------------------------------------------------
def test_a_refusal_ends_it_with_what_was_said(world: World) -> None:
    lent = lend(world)
    world.receiver.lend = lambda order: order.refuse(BatonError("not for you", kind=ErrorKind.INVALID))
    ask(lent)
    error = lent.outcome.wait()
    assert isinstance(error, PullDenied)
    assert "not for you" in error.message
    assert (error.kind, error.transfer_id, error.request_id) == (ErrorKind.INVALID, lent.transfer_id, "asker")
    assert not world.sender.endpoint._expected.ids()


def test_no_answer_ends_it_at_its_deadline(world: World) -> None:
    lent = lend(world, deadline_s=0.2)
    world.receiver.lend = lambda _order: None
    ask(lent)
    assert isinstance(lent.outcome.wait(), DeadlineExceeded)


def test_a_link_that_is_lost_ends_it(world: World) -> None:
    lent = lend(world)
    world.receiver.lend = lambda _order: None
    ask(lent)
    eventually(lambda: bool(world.receiver.pulls), "it was asked")
    world.receiver.endpoint.close()
    error = lent.outcome.wait()
    assert isinstance(error, KVTransferError)
    assert lent.outcome.count == 1


def test_a_lender_that_dies_in_the_middle_ends_it_and_touches_nothing_more(world: World) -> None:
    lent = lend(world)

    def half(order: PullOrder) -> None:
        lent.open(order).ready(0, 2, order.first_token, order.end_token)

    world.receiver.lend = half
    ask(lent)
    eventually(lambda: lent.outcome.receiving == 1, "it begins to come")
    world.receiver.endpoint.close()
    assert isinstance(lent.outcome.wait(), KVTransferError)
    assert lent.outcome.count == 1
    before = world.sender.pool.clone()
    assert torch.equal(world.sender.pool, before)


def test_another_incarnation_and_an_empty_place_end_it(world: World) -> None:
    stale, nobody = lend(world, number=1), lend(world, number=2)
    ask(stale, incarnation="d-0")
    assert isinstance(stale.outcome.wait(), StalePeer)
    gone = world.side("gone", world.config)
    address = gone.address
    gone.endpoint.close()
    ask(nobody, address=address, incarnation=gone.incarnation)
    assert isinstance(nobody.outcome.wait(), PeerGone)


def test_who_takes_it_back_hears_nothing_and_the_lender_is_told(world: World) -> None:
    lent = lend(world)
    orders: list[PullOrder] = []
    world.receiver.lend = orders.append
    ask(lent)
    eventually(lambda: bool(orders), "it was asked")
    fence = world.sender.endpoint.cancel(lent.transfer_id, Aborted("enough"))
    eventually(fence.done, "nothing is written")
    lent.send(orders[0])
    assert lent.sent is not None
    assert isinstance(lent.sent.wait(), BatonError)
    assert lent.outcome.count == 0
    assert bool((world.sender.pool[lent.target] == CANARY).all())


def test_the_lender_that_takes_its_pages_back_ends_it(world: World) -> None:
    lent = lend(world)

    def half(order: PullOrder) -> None:
        lent.open(order).ready(0, 2, order.first_token, order.end_token)

    world.receiver.lend = half
    ask(lent)
    eventually(lambda: lent.outcome.receiving == 1, "it begins to come")
    assert lent.transfer is not None
    eventually(lent.transfer.abort(Aborted("the reservation is over")).done, "nothing is read")
    assert isinstance(lent.outcome.wait(), Aborted)


def test_a_pull_needs_its_expectation_and_an_open_endpoint(world: World) -> None:
    lent = lend(world)
    world.sender.endpoint.cancel(lent.transfer_id, Aborted("enough"))
    with pytest.raises(ValueError, match="not expected"):
        ask(lent)
    other = lend(world, number=1)
    world.sender.endpoint.close()
    with pytest.raises((ValueError, Aborted)):
        ask(other)


def test_under_chaos_every_pull_ends_and_what_came_is_right() -> None:
    config = TransferConfig(wire="tcp", slot_bytes=4096, slots_per_peer=4, alive_interval_s=0.1)
    faults = Faults(random=Random(5), drop=0.05, delay=0.1, duplicate=0.1, flip=0.1, late_write=0.1)
    came = 0
    with chaos_world("tcp", faults=faults, sender_config=config, receiver_config=config, seed=5) as world:
        for number in range(20):
            lent = lend(world, end=4 * SIZE, number=number, deadline_s=1.0)
            ask(lent)
            if isinstance(lent.outcome.wait(), Receipt):
                came += 1
                lent.check_arrived()
            assert lent.outcome.count == 1
            world.receiver.free.extend(lent.source)
            world.sender.pool[lent.target] = CANARY
            world.sender.free.extend(lent.target)
    assert came


# ---- strangers ------------------------------------------------------------------------------------------------------
def pull_message(**changes: object) -> PullMessage:
    fields: dict[str, object] = {
        "transfer_id": "t", "ticket": "ticket", "first_token": 0, "end_token": 2 * SIZE, "page_hash": HASH,
        "page_tokens": SIZE, "peer_address": "tcp://127.0.0.1:1", "incarnation": "m",
    }  # fmt: skip
    return PullMessage(**{**fields, **changes})  # type: ignore[arg-type]


HOSTILE = {
    "another incarnation": pull_message(incarnation="p-1"),
    "no ticket": pull_message(ticket=""),
    "endless name": pull_message(transfer_id="x" * 5000),
    "no address": pull_message(peer_address=""),
    "empty range": pull_message(first_token=SIZE, end_token=SIZE),
    "backwards": pull_message(first_token=2 * SIZE, end_token=SIZE),
    "half pages": pull_message(end_token=SIZE + 1),
    "no page size": pull_message(page_tokens=0),
    "short hash": pull_message(page_hash=b"h"),
}


def answers(world: World, sock: socket.socket, messages: list[PeerMessage], wanted: int) -> list[PullRefused]:
    """Says hello and these, and collects refusals."""
    sock.sendall(frame(hello()))
    channel = SocketChannel(sock, max_payload_bytes=1 << 16, stall_s=5.0)
    found: list[PullRefused] = []
    pending = list(messages)

    def all_there() -> bool:
        while pending and pending[0] is not None:
            channel.send(pending.pop(0))
            if len(pending) % 50 == 0:
                break
        while (message := channel.receive(lambda _message, _size: None)) is not None:
            if message.HasField("pull_refused"):
                found.append(message.pull_refused)
        return len(found) >= wanted and not pending

    try:
        eventually(all_there, "every pull is answered")
    finally:
        channel.close()
    return found


@pytest.mark.parametrize("what", HOSTILE)
def test_a_pull_that_makes_no_sense_is_refused_by_field_and_nobody_hears_of_it(what: str) -> None:
    world = World("tcp")
    (refused,) = answers(world, dial(world), [PeerMessage(pull=HOSTILE[what])], 1)
    assert refused.error.message
    assert not world.receiver.pulls
    assert isinstance(world.send(0, 20).received.wait(), Receipt)
    world.close()


def test_a_flood_of_pulls_is_answered_one_by_one_and_harms_nobody_else() -> None:
    world = World("tcp")
    world.receiver.lend = lambda order: order.refuse(PullDenied("no such ticket"))
    run = world.start(0, 40)
    run.handle.ready(0, 4, 0, 20)
    flood = [PeerMessage(pull=pull_message(transfer_id=f"t-{number}")) for number in range(2000)]
    refused = answers(world, dial(world), flood, len(flood))
    assert {answer.transfer_id for answer in refused} == {message.pull.transfer_id for message in flood}
    run.handle.ready(0, 4, 20, 40)
    run.finish()
    assert isinstance(run.received.wait(), Receipt)
    world.close()


def test_an_address_that_makes_no_sense_is_refused_by_what_dialling_says() -> None:
    world = World("tcp")
    lent = lend(world)

    def open_and_tell(order: PullOrder) -> None:
        lent.open(order)

    world.receiver.lend = open_and_tell
    with contextlib.closing(dial(world)) as sock:
        sock.sendall(frame(hello()) + frame(PeerMessage(pull=pull_message(peer_address="nonsense"))))
        eventually(lambda: lent.sent is not None and lent.sent.value is not None, "it failed")
    assert lent.sent is not None
    assert isinstance(lent.sent.value, KVTransferError)
    world.close()


def test_only_what_was_asked_on_a_link_can_be_refused_on_it() -> None:
    """A peer that guesses names of handoffs cannot end them."""
    expected, told = Expectations(), []
    for name in ("handoff", "pull", "claimed"):
        inbound = Inbound(
            transfer_id=TransferId(name),
            request_id=RequestId("r"),
            pages=[],
            first_token=0,
            end_token=0,
            deadline_s=1.0,
        )
        expected.add(inbound)
    asked = Asked(expected, lambda inbound, error: told.append((inbound.transfer_id, type(error))))
    asked.add(TransferId("pull"))
    asked.add(TransferId("claimed"))
    assert expected.claim(TransferId("claimed"), lambda _id, _error: None) is not None
    for name in ("handoff", "unknown", "claimed", "pull", "pull"):
        asked.refused(PullRefused(transfer_id=name, error=Error(message="no")), "d")
    assert told == [("pull", PullDenied)]
    assert sorted(expected.ids()) == ["claimed", "handoff"]
    asked.add(TransferId("claimed"))
    asked.lose(PeerGone("gone"))
    assert told == [("pull", PullDenied)]
    assert len(asked) == 0


def test_what_came_is_forgotten() -> None:
    expected = Expectations()
    asked = Asked(expected, lambda _inbound, _error: None)
    asked.add(TransferId("pull"))
    asked.sweep()
    assert len(asked) == 0


def test_a_refusal_from_who_was_never_asked_changes_nothing(world: World) -> None:
    """A receiver that refuses a handoff as if it were a pull: the handoff goes on."""
    side: Side = world.receiver
    run = world.start(0, 40)
    run.handle.ready(0, 4, 0, 20)
    eventually(lambda: run.received.receiving == 1, "it comes")
    (link,) = side.endpoint._links
    link.post(lambda: link._up()[0].messages.append(  # type: ignore[attr-defined]
        PeerMessage(pull_refused=PullRefused(transfer_id=run.transfer_id))
    ))  # fmt: skip
    link.post(lambda: link._up()[0].messages.append(  # type: ignore[attr-defined]
        PeerMessage(drained=Drained(transfer_id="unknown"))
    ))  # fmt: skip
    run.handle.ready(0, 4, 20, 40)
    run.finish()
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)
