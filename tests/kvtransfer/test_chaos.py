"""The same promises under faults: wires that lose, delay, repeat, damage, and write late."""

from __future__ import annotations

import threading
from random import Random

import pytest
from support.kv_wires import ONESIDED, needs, over
from support.kv_world import World, eventually, no_kv_threads, setting

from baton_common.errors import BatonError
from baton_kvtransfer import FirstToken, KvEndpoint, Receipt, TransferConfig
from baton_kvtransfer.errors import Aborted, KVTransferError
from baton_kvtransfer.wires.chaos import Faults

WIRES = over("inproc", "shm", "tcp", *ONESIDED)
ABORTS = 500


def chaotic(wire: str, *, seed: int = 0, alive_interval_s: float = 0.1, **faults: float) -> World:
    """Quick heartbeats, so that what was lost is repeated soon; silence is judged as late as ever."""
    config = TransferConfig(
        wire=setting(wire),
        slot_bytes=4096,
        slots_per_peer=4,
        alive_interval_s=alive_interval_s,
        answer_timeout_s=4.0,
    )
    made = Faults(random=Random(seed), **faults)  # type: ignore[arg-type]
    return World(wire, faults=made, sender_config=config, receiver_config=config, seed=seed)


MIXED = {"drop": 0.03, "delay": 0.1, "duplicate": 0.1, "flip": 0.05, "late_write": 0.05}


@pytest.mark.parametrize(
    ("wire", "faults"),
    [
        ("tcp", {"duplicate": 0.3}),
        ("tcp", {"delay": 0.3}),
        ("shm", {"drop": 0.1}),
        ("shm", {"flip": 0.2}),
        ("inproc", {"late_write": 0.3}),
        ("inproc", MIXED),
        ("shm", MIXED),
        ("tcp", MIXED),
        *(pytest.param(wire, MIXED, marks=needs(wire)) for wire in ONESIDED),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_every_transfer_ends_with_right_bytes_or_a_typed_error(wire: str, faults: dict[str, float]) -> None:
    world = chaotic(wire, seed=len(faults), alive_interval_s=0.25, **faults)
    arrived = 0
    for _ in range(2):
        runs = [world.send(index, 50 + 9 * index, deadline_s=6.0) for index in range(4)]
        for run in runs:
            heard, said = run.received.wait(), run.sent.wait()
            assert isinstance(heard, Receipt | BatonError)
            assert isinstance(said, Receipt | KVTransferError)
            if isinstance(heard, Receipt):
                world.check_arrived(run)
                assert run.received.first == FirstToken(
                    token_id=run.end_token, position=0, logprob=-0.5, top=((3, -0.5),)
                )
                arrived += 1
            else:
                assert not isinstance(said, Receipt), "a receipt for what never arrived"
            world.reuse(run)
            assert (run.sent.count, run.received.count) == (1, 1)
        world.check_canaries()
    assert arrived >= 4, "faults of this size must not stop the traffic"
    world.close()
    assert no_kv_threads()


@pytest.mark.parametrize("wire", WIRES)
def test_every_flipped_bit_is_caught(wire: str) -> None:
    world = chaotic(wire, seed=5, alive_interval_s=1.0, flip=0.15)
    runs = [world.send(0, 90) for _ in range(6)]
    good = 0
    for run in runs:
        if isinstance(run.received.wait(), Receipt):
            world.check_arrived(run)
            good += 1
        run.sent.wait()
    assert good
    assert world.faults is not None
    flips = world.faults.done["flip"]
    assert flips > 0
    assert world.receiver.metric("digest_failures_total") == flips
    world.close()


@pytest.mark.parametrize("wire", WIRES)
def test_damage_in_every_chunk_ends_as_corrupt_on_both_sides(wire: str) -> None:
    world = chaotic(wire, alive_interval_s=1.0, flip=1.0)
    run = world.send(0, 40)
    assert type(run.received.wait()).__name__ == "Corrupt"
    said = run.sent.wait()
    assert isinstance(said, Aborted)
    assert said.kind.retriable
    world.close()


@pytest.mark.parametrize("wire", over("inproc", "shm", *ONESIDED))
def test_late_writes_after_aborts_corrupt_nothing(wire: str) -> None:
    """After every abort, old writes land in slots that are in use again, at any moment of the next transfers' life."""
    world = chaotic(wire, seed=9, alive_interval_s=1.0)
    stop, late = threading.Event(), [0]

    def write_late() -> None:
        assert world.faults is not None
        random = Random(3)
        while not stop.wait(0.0005):
            late[0] += sum(reach.write_late(random) for reach in world.faults.reaches)

    thread = threading.Thread(target=write_late)
    thread.start()
    try:
        good = _abort_and_reuse(world, ABORTS)
    finally:
        stop.set()
        thread.join()
    assert late[0] > 50
    assert good > 0
    world.close()


def _abort_and_reuse(world: World, aborts: int) -> int:
    """Alternate doomed transfers and honest ones; pages of the doomed are checked ever after. Returns the good ones."""
    good = done = 0
    while done < aborts:
        doomed = [world.start(0, 70) for _ in range(4)]
        for run in doomed:
            run.announce(layers_at_once=4)
        honest = world.send(3, 60)
        for number, run in enumerate(doomed):
            error = BatonError("changed my mind")
            if number % 2:
                fence = run.handle.abort(error)
                run.received.wait()
            else:
                fence = world.receiver.endpoint.cancel(run.transfer_id, error)
                run.handle.abort(error)
            eventually(fence.done, "the fence")
            world.reuse(run)
            done += 1
        if isinstance(honest.received.wait(), Receipt):
            world.check_arrived(honest)
            good += 1
        honest.sent.wait()
        world.reuse(honest)
        world.check_canaries()
    return good


@pytest.mark.parametrize("wire", WIRES)
def test_slots_survive_a_lossy_hour(wire: str) -> None:
    """After the faults stop, the link has all its slots: nothing leaked while chunks and credits were lost."""
    world = chaotic(wire, seed=2, drop=0.2)
    for _ in range(3):
        runs = [world.send(0, 60, deadline_s=1.0) for _ in range(3)]
        for run in runs:
            run.received.wait()
            run.sent.wait()
            world.reuse(run)
    assert world.faults is not None
    world.faults.drop = 0.0
    run = world.send(0, 60)
    assert isinstance(run.received.wait(), Receipt)
    eventually(lambda: free_slots(world.sender.endpoint) == [4], "all credits are home")
    world.close()


def free_slots(endpoint: KvEndpoint) -> list[int]:
    return [link._sender.free_slots for link in endpoint._out.values()]
