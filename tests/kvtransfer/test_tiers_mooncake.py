"""Pages in a real Mooncake store: a master and holders of memory that come and go."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from support.kv_tiers import FORMAT, FRAME_BYTES, LAYOUT, NAMESPACE, TierWorld, chain, frame_of, keys_of, metrics, value
from support.kv_wires import needs
from support.kv_world import eventually
from support.mooncake_store import HOST, MooncakeMaster
from support.processes import free_ports

from baton_common.clock import SystemClock
from baton_kvtransfer.blocks import HostBlocks
from baton_kvtransfer.errors import WireError
from baton_kvtransfer.tiers import TierConfig, TierFault, open_tiers
from baton_kvtransfer.tiers.guard import Guard
from baton_kvtransfer.tiers.mooncake import MooncakeTier

pytestmark = [*needs("mooncake"), pytest.mark.slow, pytest.mark.process]

SEGMENT_BYTES = 16 << 20


class Master(MooncakeMaster):
    """With clients in this process: they would make its end slow. Leases are short, so that eviction shows soon."""

    def __init__(self) -> None:
        self.tiers: list[MooncakeTier] = []
        super().__init__(lease_ms=100)

    def close(self) -> None:
        for tier in self.tiers:
            if tier._store is not None:
                tier._store.close()
        super().close()


@pytest.fixture
def master() -> Iterator[Master]:
    made = Master()
    yield made
    made.close()


def tier_of(master: Master, *, segment_bytes: int = SEGMENT_BYTES, frame_bytes: int = FRAME_BYTES) -> MooncakeTier:
    tier = MooncakeTier(master.address, host=HOST, protocol="tcp", segment_bytes=segment_bytes, frame_bytes=frame_bytes)
    master.tiers.append(tier)
    return tier


HOLDER = """
import os, sys, time
sys.path[:0] = {path!r}
from support.kv_tiers import FRAME_BYTES, chain, frame_of, keys_of
from baton_kvtransfer.tiers.mooncake import MooncakeTier
tier = MooncakeTier({master!r}, host="127.0.0.1", protocol="tcp", segment_bytes=16 << 20, frame_bytes=FRAME_BYTES)
tier.open()
for key in keys_of(chain({pages}, {salt})):
    assert tier.put(key, frame_of(key, key[0]))
print("stored", flush=True)
time.sleep(600)
"""


def holder(master: Master, pages: int, salt: int) -> subprocess.Popen[str]:
    """Another worker that lends memory and has put pages into it."""
    program = HOLDER.format(path=sys.path, master=master.address, pages=pages, salt=salt)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stored\n"
    return process


def test_pages_of_one_worker_are_found_by_another(master: Master) -> None:
    keys = keys_of(chain(5, salt=1))
    process = holder(master, 4, salt=1)
    try:
        tier = tier_of(master, segment_bytes=0)
        tier.open()
        assert tier.has(keys) == 4
        out = memoryview(bytearray(FRAME_BYTES))
        for key in keys[:4]:
            assert tier.get(key, out) == FRAME_BYTES
            assert out == frame_of(key, key[0])
        assert tier.get(keys[4], out) == 0
        assert tier.put(keys[0], frame_of(keys[0], 9)), "a page that is there stays"
        assert tier.get(keys[0], out) == FRAME_BYTES
        assert out == frame_of(keys[0], keys[0][0])
        tier.delete(keys[0])
        assert tier.has(keys) == 0
    finally:
        process.kill()
        process.wait(10)


def test_pages_go_through_the_stack(master: Master) -> None:
    hashes = chain(6, salt=2)
    tier = tier_of(master)
    with TierWorld(tier, clock=SystemClock()) as world:
        world.offload(hashes)
        eventually(lambda: value(world.metrics.bytes, "mooncake", "in") == 6 * LAYOUT.page_bytes, "stored")
        assert value(world.metrics.stored, "mooncake") == SEGMENT_BYTES
    with TierWorld(tier_of(master, segment_bytes=0), clock=SystemClock()) as world:
        assert world.restored(hashes) == 6


def test_a_page_that_somebody_damaged_is_a_miss_and_deleted(master: Master) -> None:
    (key, other, short) = keys_of(chain(3, salt=3))
    tier = tier_of(master)
    told = metrics()
    guard = Guard(tier, FORMAT, clock=SystemClock(), metrics=told, retry_s=30, slow_s=5)
    guard.put(key, frame_of(other))
    tier._store.put(f"baton/{other.hex()}", bytes(FRAME_BYTES + 1))
    tier._store.put(f"baton/{short.hex()}", bytes(frame_of(short)[:99]))
    out = memoryview(bytearray(FRAME_BYTES))
    assert not any(guard.get(each, out) for each in (key, other, short))
    assert not any(guard.has([each]) for each in (key, other, short))
    assert value(told.off, "mooncake", "read") == 0


def test_a_full_store_evicts_or_refuses_and_never_gives_another_page(master: Master) -> None:
    frame_bytes = 1 << 20
    tier = tier_of(master, frame_bytes=frame_bytes)
    tier.open()
    keys, frame, out = keys_of(chain(40, salt=4)), bytearray(frame_bytes), memoryview(bytearray(frame_bytes))
    kept = 0
    for key in keys:
        frame[:16] = key
        kept += tier.put(key, memoryview(frame))
    assert kept >= 8
    sizes = [tier.get(key, out) for key in keys if tier.get(key, out) and bytes(out[:16]) == key]
    assert set(sizes) == {frame_bytes}
    assert all(tier.get(key, out) == 0 or bytes(out[:16]) == key for key in keys)


def test_a_lease_that_ends_while_a_page_is_read_is_a_miss(master: Master) -> None:
    (key,) = keys_of(chain(1, salt=11))
    tier = tier_of(master)
    tier.open()
    assert tier.put(key, frame_of(key))
    store = tier._store

    class Slow:
        """The store, when a read takes longer than its lease."""

        def get_into(self, *call: object) -> int:
            return -707

    tier._store = Slow()
    assert tier.get(key, memoryview(bytearray(FRAME_BYTES))) == 0
    tier._store = store
    assert tier.get(key, memoryview(bytearray(FRAME_BYTES))) == FRAME_BYTES, "it is still there"


def test_a_killed_holder_is_a_miss(master: Master) -> None:
    keys = keys_of(chain(3, salt=5))
    process = holder(master, 3, salt=5)
    tier, told = tier_of(master, segment_bytes=0), metrics()
    guard = Guard(tier, FORMAT, clock=SystemClock(), metrics=told, retry_s=30, slow_s=60)
    assert guard.has(keys) == 3
    process.kill()
    process.wait(10)
    assert not guard.get(keys[0], memoryview(bytearray(FRAME_BYTES)))
    assert value(told.off, "mooncake", "read") == 0, "what others hold can still be read"


def test_a_killed_master_is_a_miss_and_its_successor_is_used(master: Master) -> None:
    hashes = chain(4, salt=6)
    tier = tier_of(master)
    with TierWorld(tier, clock=SystemClock(), retry_s=0.5) as world:
        world.offload(hashes)
        eventually(lambda: value(world.metrics.bytes, "mooncake", "in") == 4 * LAYOUT.page_bytes, "stored")
        master.kill()
        assert world.restored(hashes) == 4, "from host memory"
        assert world.restored(chain(4, salt=7)) == 0
        assert value(world.metrics.off, "mooncake", "read") == 1
        master.start()

        def back() -> bool:
            world.prefetch(chain(1, salt=8)).release()
            return value(world.metrics.off, "mooncake", "read") == 0

        eventually(back, "the new master is asked", 30)


def test_a_master_that_is_stopped_holds_up_nobody(master: Master) -> None:
    """Its client waits for half a minute; the worker's other threads go on, and the deadline ends the prefetch."""
    tier = tier_of(master)
    with TierWorld(tier, clock=SystemClock()) as world:
        world.offload(chain(2, salt=9))
        eventually(lambda: value(world.metrics.bytes, "mooncake", "in") > LAYOUT.page_bytes, "stored")
        master.process.send_signal(signal.SIGSTOP)
        ticks: list[float] = []
        done = threading.Event()

        def tick() -> None:
            while not done.wait(0.001):
                ticks.append(time.monotonic())

        threading.Thread(target=tick, daemon=True).start()
        ticket = world.stack.prefetch(chain(4, salt=10), deadline_s=world.clock.now() + 0.3)
        eventually(lambda: ticket.poll().over, "the deadline ends it")
        assert ticket.poll().ready == 0
        assert world.restored(chain(2, salt=9)) == 2
        done.set()
        gaps = [after - before for before, after in pairwise(ticks)]
        assert max(gaps) < 10.0, "nobody held the interpreter lock for as long as the library waits"
        master.process.send_signal(signal.SIGCONT)


def test_a_master_that_is_not_there_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself would hold the interpreter lock for 90 s."""
    monkeypatch.setattr("baton_kvtransfer.tiers.mooncake._TRY_S", 2.0)
    tier = MooncakeTier(
        f"{HOST}:{free_ports(1)[0]}", host=HOST, protocol="tcp", segment_bytes=0, frame_bytes=FRAME_BYTES
    )
    faults: list[str] = []

    def start() -> None:
        try:
            tier.open()
        except TierFault as fault:
            faults.append(str(fault))

    thread = threading.Thread(target=start)
    thread.start()
    ticks: list[float] = []
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.monotonic())
    assert max(after - before for before, after in pairwise(ticks)) < 20.0
    assert len(faults) == 1
    assert "does not answer" in faults[0]


def test_a_missing_library_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with TierWorld() as world, pytest.raises(WireError, match=r"pip install 'baton\[mooncake\]'"):
        open_tiers(
            TierConfig(host_bytes=1 << 20, mooncake_master="127.0.0.1:1"),
            namespace=NAMESPACE,
            blocks=HostBlocks(world.pool, LAYOUT),
            host=HOST,
            clock=SystemClock(),
            metrics=metrics(),
        )
