"""What an endpoint promises, on every wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from support.kv_wires import ONESIDED, over
from support.kv_world import LAYOUT, Side, World, eventually, no_kv_threads

from baton_common.errors import BatonError, ConfigError, ErrorKind
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import FirstToken, Inbound, Receipt, TransferConfig
from baton_kvtransfer.errors import Aborted, DeadlineExceeded, KVTransferError, PeerGone
from baton_kvtransfer.plan import cell_bytes

WIRES = over("inproc", "shm", "tcp", *ONESIDED)


@pytest.fixture(params=WIRES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()
    assert no_kv_threads()


@pytest.mark.parametrize(
    ("first_token", "end_token"),
    [(0, 1), (0, 16), (0, 17), (5, 60), (16, 64), (32, 33), (0, 200), (48, 48)],
)
def test_every_position_arrives_and_nothing_else_is_written(world: World, first_token: int, end_token: int) -> None:
    run = world.send(first_token, end_token)
    receipt = run.received.wait()
    assert isinstance(receipt, Receipt)
    world.check_arrived(run)
    assert run.received.first == FirstToken(token_id=end_token, position=0, logprob=-0.5, top=((3, -0.5),))
    assert receipt.bytes == (end_token - first_token) * LAYOUT.token_bytes
    assert receipt.wire == world.wire
    ours = run.sent.wait()
    assert isinstance(ours, Receipt)
    assert (ours.bytes, ours.chunks, ours.peer, ours.resends) == (receipt.bytes, receipt.chunks, "d", 0)
    assert ours.first_chunk_s <= ours.last_chunk_s <= ours.commit_s
    assert run.received.receiving == (1 if end_token > first_token else 0)


def test_chunks_flow_before_the_prompt_is_finished(world: World) -> None:
    run = world.start(0, 64)
    run.handle.ready(0, 4, 0, 32)
    eventually(lambda: run.received.receiving == 1, "the first chunk arrives")
    assert run.received.value is None
    for layer in range(4):
        run.handle.ready(layer, layer + 1, 32, 64)
    run.finish()
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)


def test_many_transfers_share_a_link(world: World) -> None:
    runs = [world.start(index, 40 + 3 * index) for index in range(8)]
    for run in runs:
        run.announce(layers_at_once=2, tokens_at_once=16)
    for run in runs:
        run.finish()
    for run in runs:
        assert isinstance(run.sent.wait(), Receipt)
        assert isinstance(run.received.wait(), Receipt)
        world.check_arrived(run)
    assert len(world.sender.endpoint.peers()) == 1


def test_threads_may_announce_and_finish_concurrently(world: World) -> None:
    runs = [world.start(0, 30) for _ in range(4)]

    def drive(index: int) -> None:
        runs[index].announce()
        runs[index].finish()

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        assert isinstance(run.received.wait(), Receipt)
        world.check_arrived(run)


def test_one_slot_is_enough(world: World) -> None:
    tight = World(world.wire, receiver_config=TransferConfig(wire=world.config.wire, slot_bytes=4096, slots_per_peer=1))
    run = tight.send(0, 100)
    assert isinstance(run.received.wait(), Receipt)
    tight.check_arrived(run)
    tight.close()


def test_a_transfer_that_nobody_expects_is_refused_at_once(world: World) -> None:
    run = world.start(0, 20, expect=False)
    error = run.sent.wait()
    assert isinstance(error, Aborted)
    assert error.kind is ErrorKind.TRANSFER
    assert "never announced" in error.message


@pytest.mark.parametrize("stage", ["opened", "partly ready", "all ready", "finished"])
@pytest.mark.parametrize("by", ["sender", "receiver"])
def test_an_abort_frees_both_sides_at_any_time(world: World, stage: str, by: str) -> None:
    run = world.start(0, 60)
    if stage == "partly ready":
        run.handle.ready(0, 2, 0, 60)
        eventually(lambda: run.received.receiving == 1, "the first chunk arrives")
    elif stage in ("all ready", "finished"):
        run.announce()
        if stage == "finished":
            run.finish()
    error = BatonError("enough", kind=ErrorKind.ABORTED)
    if by == "sender":
        fence, other = run.handle.abort(error), run.received
    else:
        fence, other = world.receiver.endpoint.cancel(run.transfer_id, error), run.sent
    eventually(fence.done, "the fence")
    if by == "receiver":
        world.reuse(run)
    told = other.wait()
    if isinstance(told, BatonError):
        assert "enough" in told.message or "never announced" in told.message
        assert told.kind in (ErrorKind.ABORTED, ErrorKind.TRANSFER)
    else:
        assert stage == "finished"  # the commit was quicker
    following = world.send(0, 60)  # the link is as good as new
    assert isinstance(following.received.wait(), Receipt)
    world.check_arrived(following)
    world.check_canaries()
    assert run.sent.count <= 1
    assert run.received.count <= 1


def test_an_aborted_owner_hears_nothing_more(world: World) -> None:
    run = world.start(0, 40)
    run.announce()
    run.handle.abort(BatonError("mine"))
    assert isinstance(run.received.wait(), Aborted)
    assert run.sent.count == 0
    run.handle.ready(0, 4, 0, 40)
    run.finish()
    assert run.handle.abort(BatonError("again")).done()


def test_cancelling_what_is_over_or_unknown_is_harmless(world: World) -> None:
    run = world.send(0, 20)
    run.received.wait()
    assert world.receiver.endpoint.cancel(run.transfer_id, BatonError("late")).done()
    assert world.receiver.endpoint.cancel(TransferId("nobody"), BatonError("late")).done()
    assert run.received.count == 1


def test_the_fence_of_a_running_gather_waits_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    blocks = world.sender.endpoint._local.blocks
    gather = blocks.gather

    def slow(*arguments: object) -> int:
        entered.set()
        assert go_on.wait(10)
        return gather(*arguments)

    monkeypatch.setattr(blocks, "gather", slow)
    run = world.start(0, 20)
    run.announce()
    assert entered.wait(10)
    fence = run.handle.abort(BatonError("stop"))
    assert not fence.done()
    go_on.set()
    eventually(fence.done, "the gather is over")


def test_the_fence_of_a_running_scatter_waits_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    blocks = world.receiver.endpoint._local.blocks
    scatter = blocks.scatter

    def slow(*arguments: object, **how: object) -> bool:
        entered.set()
        assert go_on.wait(10)
        return scatter(*arguments, **how)

    monkeypatch.setattr(blocks, "scatter", slow)
    run = world.send(0, 60)
    assert entered.wait(10)
    fences = [world.receiver.endpoint.cancel(run.transfer_id, BatonError("stop")) for _ in range(3)]
    assert not any(fence.done() for fence in fences)
    go_on.set()
    for fence in fences:
        eventually(fence.done, "the scatter is over")
    world.reuse(run)
    assert isinstance(run.sent.wait(), Aborted)
    world.check_canaries()


def test_the_deadline_of_the_sender_ends_both_sides(world: World) -> None:
    assert isinstance(world.send(0, 20).sent.wait(), Receipt)  # so that the link is up before the deadline
    run = world.start(0, 60, deadline_s=1.0)
    run.handle.ready(0, 4, 0, 30)
    ours, theirs = run.sent.wait(), run.received.wait()
    assert isinstance(ours, DeadlineExceeded | Aborted)
    assert isinstance(theirs, DeadlineExceeded | Aborted)
    assert ours.kind is theirs.kind is ErrorKind.DEADLINE


def test_a_ticket_that_nobody_uses_ends_at_its_deadline(world: World) -> None:
    run = world.start(0, 20, deadline_s=0.2, address=world.sender.address, incarnation=world.sender.incarnation)
    error = run.received.wait()
    assert isinstance(error, DeadlineExceeded)
    assert error.phase == "new"


def test_a_dead_address_is_an_error_not_a_hang(world: World) -> None:
    address = world.receiver.address
    world.receiver.endpoint.close()
    run = world.start(0, 20, address=address)
    error = run.sent.wait()
    assert isinstance(error, PeerGone)
    assert error.phase == "queued"
    assert error.transfer_id == run.transfer_id


def test_an_address_that_makes_no_sense_is_an_error(world: World) -> None:
    run = world.start(0, 20, address="http://nowhere")
    assert isinstance(run.sent.wait(), KVTransferError)


@pytest.mark.parametrize("closing", ["sender", "receiver"])
def test_closing_an_endpoint_ends_what_is_in_flight_on_both_sides(world: World, closing: str) -> None:
    run = world.start(0, 60)
    run.handle.ready(0, 2, 0, 60)
    eventually(lambda: run.received.receiving == 1, "the first chunk arrives")
    (world.sender if closing == "sender" else world.receiver).endpoint.close()
    assert isinstance(run.sent.wait(), KVTransferError)
    assert isinstance(run.received.wait(), KVTransferError)


def test_a_closed_endpoint_opens_nothing(world: World) -> None:
    world.sender.endpoint.close()
    with pytest.raises(Aborted, match="closed"):
        world.start(0, 20)


def test_ranges_that_do_not_fit_the_pages_are_refused_by_name(world: World) -> None:
    inbound = Inbound(
        transfer_id=TransferId("x"), request_id=RequestId("r"), pages=[PageId(1)], first_token=0, end_token=17,
        deadline_s=time.monotonic() + 9,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\[0, 17\) do not fit 1 pages"):
        world.receiver.endpoint.expect(inbound)


def test_a_second_expectation_of_the_same_transfer_is_refused(world: World) -> None:
    run = world.start(0, 20)
    again = Inbound(
        transfer_id=run.transfer_id, request_id=RequestId("r"), pages=[], first_token=0, end_token=0, deadline_s=1e9
    )
    with pytest.raises(ValueError, match="expected already"):
        world.receiver.endpoint.expect(again)


def test_metrics_count_bytes_chunks_and_outcomes(world: World) -> None:
    run = world.send(0, 64)
    receipt = run.sent.wait()
    assert isinstance(receipt, Receipt)
    wire = world.wire
    assert world.sender.metric("bytes_total", direction="out", wire=wire) == receipt.bytes
    assert world.receiver.metric("chunks_total", direction="in", wire=wire) == receipt.chunks
    eventually(lambda: world.sender.metric("committed_total", direction="out") == 1, "counted")
    assert world.sender.metric("handoff_seconds_count", direction="out") == 1
    assert world.sender.metric("links", direction="out") == 1
    eventually(lambda: world.sender.metric("free_slots") > 0, "the heartbeat gauges free slots")
    world.sender.endpoint.close()
    assert world.sender.metric("links", direction="out") == world.sender.metric("free_slots") == 0


def test_peers_tell_wire_and_why(world: World) -> None:
    world.send(0, 20).received.wait()
    (out,), (back,) = world.sender.endpoint.peers(), world.receiver.endpoint.peers()
    assert (out.worker_id, out.state, out.wire, out.direction) == ("d", "up", world.wire, "out")
    assert (back.worker_id, back.state, back.wire, back.direction) == ("p", "up", world.wire, "in")
    assert out.reason


def test_an_idle_link_costs_next_to_nothing(world: World) -> None:
    world.send(0, 20).received.wait()
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.05


def test_slots_too_small_for_one_position_are_refused_at_start_with_the_size_to_set() -> None:
    with pytest.raises(ConfigError, match="set slot_bytes to 4096 or more") as refused:
        Side("p", config=TransferConfig(wire="tcp", slot_bytes=cell_bytes(LAYOUT) - 1))
    assert refused.value.param == "slot_bytes"
    Side("p", config=TransferConfig(wire="tcp", slot_bytes=cell_bytes(LAYOUT))).endpoint.close()
