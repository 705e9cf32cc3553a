"""Wires that write into the peer's memory: what a write under way may and may not do, and how the thread lives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from random import Random

import pytest
from support.kv_pure import LAYOUT, TIMERS
from support.kv_wires import ONESIDED, over
from support.kv_world import LIMIT_S, World, eventually, no_kv_threads

from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import FirstToken, Outbound, Receipt
from baton_kvtransfer.errors import KVTransferError, PeerGone, WireError
from baton_kvtransfer.inlink import InLink
from baton_kvtransfer.sending import Sender
from baton_kvtransfer.slots import SlotTable
from baton_kvtransfer.wires.oneside.engine import Engine, Region
from baton_kvtransfer.wires.oneside.memory import SlotMemory
from baton_kvtransfer.wires.oneside.mooncake import MooncakeEngine
from baton_kvtransfer.wires.oneside.nixl import NixlEngine
from baton_kvtransfer.wires.oneside.pump import Pump
from baton_kvtransfer.wires.oneside.wire import OnesideLanding
from baton_proto.peer_pb2 import Granted, PeerMessage

ENGINES = {"nixl": NixlEngine, "mooncake": lambda: MooncakeEngine("127.0.0.1", "tcp")}


def finished(write: object, limit_s: float = 10.0) -> bool:
    eventually(write.landed, "the write lands", limit_s)  # type: ignore[attr-defined]
    return True


# ---- engines --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wire", over(*ONESIDED))
def test_a_write_changes_its_own_bytes_and_no_others(wire: str) -> None:
    ours, theirs = ENGINES[wire](), ENGINES[wire]()
    landing, staging = SlotMemory(1 << 16), SlotMemory(1 << 16)
    target = ours.reach(theirs.land(landing.region), staging.region)
    staging.view[:] = b"x" * (1 << 16)
    finished(target.write(4096, 100))
    assert bytes(landing.view[4096:4196]) == b"x" * 100
    assert not any(landing.view[:4096])
    assert not any(landing.view[4196:])
    target.close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("wire", over(*ONESIDED))
def test_what_a_stranger_announces_is_believed_or_a_typed_error(wire: str) -> None:
    engine, other = ENGINES[wire](), ENGINES[wire]()
    landing, staging = SlotMemory(4096), SlotMemory(8192)
    good = other.land(landing.region)
    random = Random(4)
    damaged = [good[: random.randrange(len(good))] for _ in range(20)]
    for announced in (b"", random.randbytes(200), good, *damaged):  # `good` is too small for the slots
        with pytest.raises(KVTransferError):
            engine.reach(announced, staging.region)
    engine.close()
    other.close()


@pytest.fixture
def slow_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sockets a large write takes long enough to be caught under way."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def landed_mib(view: memoryview) -> int:
    return sum(view[at] == ord("x") for at in range(0, len(view), 1 << 20))


@pytest.mark.usefixtures("slow_nixl")
@pytest.mark.parametrize("wire", over("nixl"))
def test_a_write_that_was_released_goes_on_and_ends_where_nobody_reads(wire: str) -> None:
    """The reason for all of it: neither a release nor a deregistration nor a fence stops the bytes."""
    ours, theirs = ENGINES[wire](), ENGINES[wire]()
    size, staging = 128 << 20, SlotMemory(128 << 20)
    staging.view[:] = b"x" * size
    for _ in range(5):
        landing = SlotMemory(size)
        view = landing.view
        target = ours.reach(theirs.land(landing.region), staging.region)
        target.write(0, size)
        target.release(0)
        landing.pin()
        theirs.forget(landing.region)
        landed = landed_mib(view)
        if landed < size >> 20:  # else it was over already: a busy machine; once more
            break
    else:
        pytest.skip("no write could be caught under way")
    eventually(lambda view=view: landed_mib(view) > landed, "late bytes, after release and deregistration")  # type: ignore[misc]
    fresh, again = SlotMemory(4096), SlotMemory(4096)
    assert not landing.region.address <= fresh.region.address < landing.region.address + size
    second = ours.reach(theirs.land(fresh.region), again.region)
    again.view[:] = b"y" * 4096
    finished(second.write(0, 4096))
    assert bytes(fresh.view) == b"y" * 4096
    ours.close()
    theirs.close()


@pytest.mark.parametrize("wire", over("nixl", "mooncake"))
def test_slots_deregistered_in_the_middle_end_as_right_bytes_or_a_typed_error(wire: str) -> None:
    """NIXL goes on writing, Mooncake refuses; neither may leave a wrong page, or an owner without an answer."""
    world = World(wire)
    run = world.start(0, 200)
    run.handle.ready(0, 2, 0, 200)
    eventually(lambda: run.received.receiving == 1, "chunks arrive")
    (link,) = world.receiver.endpoint._links
    assert isinstance(link, InLink)
    assert isinstance(link._memory, OnesideLanding)
    region = link._memory._memory.region
    link._memory._pump.ask(lambda engine: engine.forget(region), LIMIT_S)
    run.handle.ready(2, 4, 0, 200)
    run.finish()
    outcome = run.received.wait()
    if isinstance(outcome, Receipt):
        world.check_arrived(run)
    else:
        assert isinstance(outcome, KVTransferError)
    assert isinstance(run.sent.wait(), Receipt | KVTransferError)
    world.reuse(run)
    world.check_canaries()
    again = world.side("p2", world.config)
    following = world.start(0, 60, sender=again)
    following.announce()
    following.finish()
    assert isinstance(following.received.wait(), Receipt), "another link has slots of its own"
    again.endpoint.close()
    world.close()


def test_memory_that_was_announced_is_never_mapped_again() -> None:
    regions: list[Region] = []
    for _ in range(50):
        memory = SlotMemory(1 << 16)
        memory.view[:4] = b"late"
        memory.pin()
        memory.empty()
        regions.append(memory.region)
        del memory
    addresses = sorted(region.address for region in regions)
    assert all(after - before >= 1 << 16 for before, after in pairwise(addresses))


class FakeMooncake:
    """Refuses one segment for ever, as the tcp transport does after an oversized batch."""

    def __init__(self, wedged: str = "") -> None:
        self.wedged = wedged
        self.wrote: list[str] = []

    def initialize(self, *_: str) -> int:
        return 0

    def register_memory(self, *_: int) -> int:
        return 0

    def unregister_memory(self, *_: int) -> int:
        return 0

    def transfer_submit_write(self, segment: str, *_: int) -> int:
        self.wrote.append(segment)
        return 7

    def transfer_check_status(self, _: int) -> int:
        return -1 if self.wrote[-1] == self.wedged else 1


def test_a_peer_that_mooncake_refuses_twice_gets_another_engine_and_others_keep_theirs() -> None:
    made = [FakeMooncake("a:1"), FakeMooncake()]
    fresh = iter(made)
    engine = MooncakeEngine("h", "tcp", open_engine=lambda: next(fresh))
    staging = SlotMemory(4096).region
    announced = {name: (b"\0" * 8 + (4096).to_bytes(8, "little") + name.encode()) for name in ("a:1", "b:1")}
    wedged = engine.reach(announced["a:1"], staging).write(0, 64)
    assert not wedged.landed()  # once is tried again
    with pytest.raises(PeerGone, match="tried 2 times"):
        wedged.landed()
    assert engine.reach(announced["b:1"], staging).write(0, 64).landed()
    assert engine.reach(announced["a:1"], staging).write(0, 64).landed()
    assert [one.wrote for one in made] == [["a:1", "a:1", "b:1"], ["a:1"]]


# ---- a rogue peer, for real -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("wire", over(*ONESIDED))
def test_a_peer_that_writes_whenever_it_likes_corrupts_nothing(wire: str) -> None:
    """It knows the slots of the link and fires at them through the library while transfers are made and aborted."""
    world = World(wire)
    world.send(0, 20).received.wait()
    (link,) = world.receiver.endpoint._links
    assert isinstance(link, InLink)
    assert link._memory is not None
    region = link._memory.region
    stop, fired = threading.Event(), [0]

    def fire() -> None:
        rogue = ENGINES[wire]()
        noise = SlotMemory(4 * 4096)
        target = rogue.reach(region, noise.region)
        random = Random(6)
        while not stop.wait(0.0005):
            noise.view[:] = random.randbytes(4 * 4096)
            finished(target.write(random.randrange(4) * 4096 + random.randrange(3000), random.randint(1, 1000)))
            fired[0] += 1
        rogue.close()

    thread = threading.Thread(target=fire)
    thread.start()
    good = 0
    try:
        for _ in range(40):
            doomed = world.start(0, 70)
            doomed.announce(layers_at_once=4)
            honest = world.send(3, 60)
            fence = doomed.handle.abort(BatonError("changed my mind"))
            doomed.received.wait()
            eventually(fence.done, "the fence")
            world.reuse(doomed)
            if isinstance(honest.received.wait(), Receipt):
                world.check_arrived(honest)
                good += 1
            honest.sent.wait()
            world.reuse(honest)
            world.check_canaries()
    finally:
        stop.set()
        thread.join()
    assert fired[0] > 20
    assert good > 10
    world.close()
    assert no_kv_threads()


# ---- the pump -------------------------------------------------------------------------------------------------------
class FakeTarget:
    def __init__(self) -> None:
        self.state: bool | Exception = False
        self.closed = False

    def write(self, offset: int, size: int) -> FakeTarget:
        if size == 0:
            raise WireError("nothing to write")
        return self

    def landed(self) -> bool:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    most_writes = 2

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}
        self.closed = False

    def land(self, region: Region) -> bytes:
        self.threads.add(threading.get_ident())
        return b"here"

    def forget(self, region: Region) -> None: ...

    def reach(self, announced: bytes, staging: Region) -> FakeTarget:
        return FakeTarget()

    def close(self) -> None:
        self.closed = True


def test_one_thread_makes_uses_and_ends_the_engine() -> None:
    made: list[FakeEngine] = []

    def open_engine() -> Engine:
        made.append(FakeEngine())
        return made[-1]

    pump = Pump("fake", open_engine)
    assert not made
    region = SlotMemory(4096).region
    assert [pump.ask(lambda engine: engine.land(region), 5.0) for _ in range(3)] == [b"here"] * 3
    pump.close()
    (engine,) = made
    assert engine.closed
    assert len(engine.threads) == 1
    with pytest.raises(WireError, match="closed"):
        pump.ask(lambda engine: None, 5.0)
    pump.close()


def test_an_engine_that_cannot_start_is_an_error_for_whoever_asks_and_is_tried_again() -> None:
    attempts: list[Exception] = [WireError("no device")]

    def open_engine() -> Engine:
        if attempts:
            raise attempts.pop()
        return FakeEngine()

    pump = Pump("fake", open_engine)
    with pytest.raises(WireError, match="no device"):
        pump.ask(lambda engine: None, 5.0)
    pump.ask(lambda engine: None, 5.0)
    pump.close()


def test_a_library_that_does_not_answer_is_an_error_in_time() -> None:
    pump, free = Pump("fake", FakeEngine), threading.Event()
    with pytest.raises(WireError, match="did not answer"):
        pump.ask(lambda engine: free.wait(10), 0.1)
    free.set()
    pump.close()


@pytest.mark.parametrize(("failure", "heard_as"), [(PeerGone("died"), PeerGone), (KeyError("a defect"), WireError)])
def test_writes_end_once_each_and_a_target_is_closed_after_its_last(failure: Exception, heard_as: type) -> None:
    pump, target, staging = Pump("fake", FakeEngine), FakeTarget(), SlotMemory(4096)
    heard: list[KVTransferError | None] = []
    pump.ask(lambda engine: None, 5.0)
    pump.write(target, 0, 10, heard.append)
    pump.write(target, 0, 0, heard.append)
    pump.leave(target, staging)
    eventually(lambda: len(heard) == 1, "the refusal")
    assert isinstance(heard[0], WireError)
    assert not target.closed
    target.state = failure
    eventually(lambda: target.closed, "the target is closed")
    assert len(heard) == 2
    assert isinstance(heard[1], heard_as)
    pump.close()


def test_a_write_that_never_ends_holds_its_memory_and_nothing_else() -> None:
    pump, target, staging = Pump("fake", FakeEngine), FakeTarget(), SlotMemory(4096)
    view = staging.view
    pump.ask(lambda engine: None, 5.0)
    pump.write(target, 0, 10, lambda _: None)
    pump.leave(target, staging)
    began_s = time.process_time()
    time.sleep(1.5)
    used_s = time.process_time() - began_s
    print(f"a stuck write costs {used_s / 1.5:.3f} of a core")
    pump.close()
    assert not target.closed
    del staging
    assert view[0] == 0  # still mapped
    assert no_kv_threads()


# ---- the protocol above ---------------------------------------------------------------------------------------------
def test_sent_waits_for_chunks_under_way_and_their_slots_are_not_called_missed() -> None:
    sender = Sender(layout=LAYOUT, slot_bytes=40, timers=TIMERS)
    sender.connected(peer="d", wire="w", slots=SlotTable(8).snapshot(), slot_bytes=40, payload=LAYOUT.dtype, now_s=0.0)
    order = Outbound(
        transfer_id=TransferId("t"), request_id=RequestId("r"), peer_address="", peer_incarnation="",
        pages=[PageId(0)], first_token=0, end_token=4, deadline_s=60.0, done=lambda _: None,
    )  # fmt: skip
    sender.open(order, 0.0)
    sender.receive(PeerMessage(granted=Granted(transfer_id="t")), 0.0)
    sender.ready(TransferId("t"), (0, LAYOUT.layers), (0, 4), 0.0)
    pushes = []
    while (push := sender.next_push()) is not None:
        pushes.append(push)
    assert len(pushes) == LAYOUT.layers
    sender.finish(TransferId("t"), FirstToken(token_id=1, position=0), 0.0)
    for now_s in (1.0, 2.0, 2.9):
        sender.tick(now_s)
    kinds = [message.WhichOneof("kind") for message in sender.messages]
    assert "sent" not in kinds
    assert all(not message.alive.slots for message in sender.messages)
    for push in reversed(pushes):
        assert "sent" not in [message.WhichOneof("kind") for message in sender.messages]
        sender.pushed(push, 2.9)
    assert sender.messages[-1].sent.chunks == len(pushes)


# ---- processes ------------------------------------------------------------------------------------------------------
STORY = """
import sys
sys.path[:0] = {path!r}
from support.kv_world import World
world = World({wire!r})
run = world.send(0, 60)
run.received.wait(), run.sent.wait()
world.check_arrived(run)
world.close()
print("told")
"""


@pytest.mark.slow
@pytest.mark.parametrize("wire", over(*ONESIDED))
def test_a_process_that_used_the_library_ends_cleanly(wire: str) -> None:
    program = STORY.format(path=[path for path in sys.path if path], wire=wire)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, env=environment)
    assert done.stdout.splitlines()[-1] == "told", done.stderr[-2000:]
    assert done.returncode == 0


@pytest.mark.parametrize("wire", over("nixl"))
def test_a_process_leaves_with_its_status_past_the_exit_handlers_of_nixl(wire: str) -> None:
    program = (
        "import atexit, sys; from baton_kvtransfer import leave; from baton_kvtransfer.wires.oneside import nixl\n"
        "atexit.register(print, 'handlers')\n"
        "if sys.argv[1] == 'nixl': nixl.load()\n"
        "print('all is closed'); leave(3)"
    )
    for loaded, said in ((wire, "all is closed\n"), ("nothing", "all is closed\nhandlers\n")):
        done = subprocess.run([sys.executable, "-c", program, loaded], capture_output=True, text=True, timeout=90)
        assert (done.returncode, done.stdout) == (3, said), done.stderr[-2000:]
