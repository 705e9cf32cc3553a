"""Pages of a pool that go down into tiers and come back."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support.kv_tiers import (
    FRAME_BYTES,
    LAYOUT,
    NAMESPACE,
    DictTier,
    Door,
    TierWorld,
    chain,
    frame_of,
    keys_of,
    metrics,
    value,
    waited,
)
from support.kv_world import eventually

from baton_common.clock import ManualClock, SystemClock
from baton_common.ids import PageId
from baton_kvtransfer.blocks import MULTILINEAR, Blocks, HostBlocks
from baton_kvtransfer.tiers import SessionId, TierConfig, TierStack, open_tiers
from baton_kvtransfer.tiers.file import FileTier


class Held(HostBlocks):
    """Blocks that wait at a door."""

    def __init__(self, pool: torch.Tensor, door: Door) -> None:
        super().__init__(pool, LAYOUT)
        self._door = door

    def gather(self, *call: object) -> int:
        self._door.wait()
        return super().gather(*call)


class Broken(HostBlocks):
    """Blocks of a device that fails."""

    def gather(self, *call: object) -> int:
        raise RuntimeError("device lost")


def file_tier(path: Path, pages: int = 1000) -> FileTier:
    return FileTier(path, quota_bytes=pages * 4096, metrics=metrics())


def test_pages_come_back_from_host_memory() -> None:
    hashes = chain(6)
    with TierWorld() as world:
        assert world.offload(hashes).pages == 6
        assert world.restored(hashes) == 6
        assert value(world.metrics.hits, "host") == 6


def test_a_page_goes_into_every_tier_and_comes_back_from_any(tmp_path: Path) -> None:
    hashes = chain(6)
    upper, lower = DictTier("upper"), DictTier("lower")
    with TierWorld(upper, lower) as world:
        world.offload(hashes)
        eventually(lambda: len(lower.held) == 6 == len(upper.held), "all tiers have it")
    for have in ([upper], [lower], [upper, lower]):
        with TierWorld(*have) as world:
            assert world.restored(hashes) == 6


def test_what_a_lower_tier_gives_is_written_to_those_above() -> None:
    hashes = chain(4)
    held = {key: bytes(frame_of(key)) for key in keys_of(hashes)}
    top, middle, bottom = DictTier("a"), DictTier("b"), DictTier("c", held=held)
    with TierWorld(top, middle, bottom) as world:
        assert world.prefetch(hashes).poll().ready == 4
        eventually(lambda: len(top.held) == 4 == len(middle.held), "promoted")
    assert "put" not in bottom.calls


def test_a_run_is_put_together_from_several_tiers() -> None:
    """Pages 0-1 lie in the host pool, 2-3 above, 4-5 below, 6 above, and 7 nowhere."""
    hashes = chain(9)
    keys = keys_of(hashes)
    upper = DictTier("a", held={key: bytes(frame_of(key)) for key in (keys[2], keys[3], keys[6], keys[8])})
    lower = DictTier("b", held={key: bytes(frame_of(key)) for key in keys[4:6]})
    with TierWorld(upper, lower) as world:
        world.offload(hashes[:2])
        ticket = world.prefetch(hashes)
        assert ticket.poll().ready == 7
        ticket.release()


def test_pages_survive_the_process(tmp_path: Path) -> None:
    hashes = chain(6)
    with TierWorld(file_tier(tmp_path)) as world:
        world.offload(hashes)
    with TierWorld(file_tier(tmp_path)) as world:
        assert world.restored(hashes) == 6


def test_a_page_of_another_model_is_not_found(tmp_path: Path) -> None:
    hashes = chain(6)
    with TierWorld(file_tier(tmp_path)) as world:
        world.offload(hashes)
    with TierWorld(file_tier(tmp_path), namespace=replace(NAMESPACE, model_digest="other")) as world:
        assert world.restored(hashes) == 0


def test_damage_on_disk_shortens_the_run(tmp_path: Path) -> None:
    hashes = chain(6)
    with TierWorld(file_tier(tmp_path)) as world:
        world.offload(hashes)
    (path,) = tmp_path.rglob(f"{keys_of(hashes)[3].hex()}.page")
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)
    with TierWorld(file_tier(tmp_path)) as world:
        assert world.restored(hashes) == 3
        assert value(world.metrics.damaged, "file") == 1


def test_damage_in_host_memory_never_reaches_the_pool() -> None:
    hashes = chain(3)
    with TierWorld() as world:
        world.offload(hashes)
        (frame,) = world.stack._pool.hold(hashes[1:2])
        frame.view[100] ^= 1
        world.stack._pool.release_all([frame])
        assert world.restored(hashes) == 1
        assert value(world.metrics.damaged, "host") == 1
        assert world.restored(hashes) == 1, "and it is not there any more"


# ---- when a page is kept ---------------------------------------------------------------------------------------------
def test_a_page_is_kept_at_its_nth_use() -> None:
    hashes = chain(2)
    with TierWorld(after_uses=3) as world:
        assert [world.offload(hashes).pages for _ in range(4)] == [0, 0, 2, 0]


def test_uses_are_remembered_for_the_latest_pages_only() -> None:
    with TierWorld(host_pages=4, after_uses=2) as world:
        world.offload(chain(1))
        world.offload(chain(16, salt=1))
        assert world.offload(chain(1)).pages == 0


def test_a_page_that_is_kept_is_not_copied_again() -> None:
    tier = DictTier()
    with TierWorld(tier) as world:
        world.offload(chain(3))
        assert world.offload(chain(4)).pages == 1
        eventually(lambda: tier.calls.count("put") == 4, "written once each")


def test_a_chain_longer_than_the_pool_keeps_its_beginning() -> None:
    hashes = chain(10)
    with TierWorld(host_pages=4) as world:
        assert world.offload(hashes).pages == 4
        assert world.restored(hashes) == 4
        assert value(world.metrics.skipped, "host", "room") == 1


def test_pages_hold_still_until_the_copy_is_done() -> None:
    door = Door()
    world = TierWorld(blocks=lambda pool: Held(pool, door))
    copy = world.stack.offload(chain(2), [PageId(0), PageId(1)])
    assert door.waiting.wait(5)
    assert not copy.done()
    door.open()
    eventually(copy.done, "copied")
    assert copy.pages == 2
    world.stack.close()


def test_too_much_to_do_is_left_out_and_never_waited_for() -> None:
    door = Door()
    world = TierWorld(blocks=lambda pool: Held(pool, door), queue_pages=4)
    first = world.stack.offload(chain(1), [PageId(0)])
    assert door.waiting.wait(5)
    second = world.stack.offload(chain(4, salt=1), [PageId(page) for page in range(4)])
    third = world.stack.offload(chain(2, salt=2), [PageId(0), PageId(1)])
    assert (second.done(), third.done(), third.pages) == (False, True, 0)
    assert value(world.metrics.skipped, "host", "queue") == 2
    door.open()
    eventually(lambda: first.done() and second.done(), "copied")
    world.stack.close()


def test_a_restore_that_finds_the_queue_full_restores_nothing() -> None:
    door, hashes = Door(), chain(2)
    with TierWorld(queue_pages=32) as world:
        world.offload(hashes)
        tickets = [world.prefetch(hashes) for _ in range(3)]
        world.stack._copier._lane._urgent.most = 2
        world.stack._copier._lane.urgent(door.wait)
        assert door.waiting.wait(5)
        copies = [world.stack.restore(ticket, [PageId(9), PageId(10)]) for ticket in tickets]
        assert [copy.done() for copy in copies] == [False, True, True]
        door.open()
        eventually(copies[0].done, "restored")
        assert [copy.pages for copy in copies] == [2, 0, 0]
        assert world.offload(chain(32, salt=1)).pages == 32, "no frame is held"


def test_a_pool_that_cannot_be_read_keeps_nothing() -> None:
    with TierWorld(blocks=lambda pool: Broken(pool, LAYOUT)) as world:
        assert world.offload(chain(2)).pages == 0
        assert world.restored(chain(2)) == 0
        assert value(world.metrics.skipped, "host", "copy") == 2


# ---- prefetch --------------------------------------------------------------------------------------------------------
def test_a_prefetch_ends_at_its_deadline_with_what_is_ready() -> None:
    clock, door, hashes = ManualClock(), Door(), chain(4)
    tier = DictTier(held={key: bytes(frame_of(key)) for key in keys_of(hashes)})
    tier.before = lambda call: door.wait() if tier.calls.count("get") == 3 else None
    with TierWorld(tier, clock=clock) as world:
        ticket = world.stack.prefetch(hashes, deadline_s=2.0)
        assert door.waiting.wait(5)
        assert (ticket.poll().ready, ticket.poll().over) == (2, False)
        clock.advance(2.0)
        assert (ticket.poll().ready, ticket.poll().over) == (2, True)
        door.open()
        eventually(lambda: not world.stack._pool.missing(hashes[2:3]), "the page that was on its way is kept")
        assert ticket.poll().ready == 2, "over is for ever"
        assert world.restore(ticket, 0, 4) == 2


def test_a_deadline_of_now_asks_host_memory_alone() -> None:
    tier, hashes = DictTier(), chain(4)
    with TierWorld(tier) as world:
        world.offload(hashes[:2])
        ticket = world.stack.prefetch(hashes, deadline_s=world.clock.now())
        assert (ticket.poll().ready, ticket.poll().over) == (2, True)
    assert "has" not in tier.calls


def test_frames_of_a_ticket_stay_until_it_ends() -> None:
    hashes = chain(3)
    with TierWorld(host_pages=4) as world:
        world.offload(hashes)
        ticket = world.prefetch(hashes)
        world.offload(chain(4, salt=1))
        assert world.restore(ticket, 40, 3) == 3
        world.offload(chain(4, salt=1))
        assert world.prefetch(hashes).poll().ready == 0
        ticket.release()


def test_a_released_ticket_gives_its_frames_back_once() -> None:
    hashes = chain(3)
    with TierWorld(host_pages=4) as world:
        world.offload(hashes)
        ticket = world.prefetch(hashes)
        ticket.release()
        ticket.release()
        assert world.restore(ticket, 0, 3) == 0
        assert world.offload(chain(4, salt=1)).pages == 4


def test_a_prefetch_larger_than_the_pool_brings_what_fits() -> None:
    hashes = chain(8)
    tier = DictTier(held={key: bytes(frame_of(key)) for key in keys_of(hashes)})
    with TierWorld(tier, host_pages=4) as world:
        ticket = world.prefetch(hashes)
        assert ticket.poll().ready == 4
        ticket.release()


def test_a_restore_takes_fewer_pages_when_asked_for_fewer() -> None:
    hashes = chain(3)
    with TierWorld(host_pages=4) as world:
        world.offload(hashes)
        assert world.restore(world.prefetch(hashes), 20, 1) == 1
        assert world.offload(chain(4, salt=1)).pages == 4, "nothing is held"


def test_a_tier_that_hangs_holds_up_no_other_and_no_caller() -> None:
    """Reads go on from the tier that works; the hanging one is asked, and the deadline ends it."""
    door, hashes = Door(), chain(4)
    works = DictTier("a", held={key: bytes(frame_of(key)) for key in keys_of(hashes)[:2]})
    hangs = DictTier("b", before=lambda call: door.wait() if call == "has" else None)
    world = TierWorld(works, hangs, clock=SystemClock(), host_pages=12)
    began_s = time.monotonic()
    ticket = world.stack.prefetch(hashes, deadline_s=began_s + 1.5)
    calls_s = time.monotonic() - began_s
    eventually(lambda: ticket.poll().over, "the deadline ends it")
    assert ticket.poll().ready == 2
    assert door.waiting.wait(5)
    for salt in range(1, 6):
        world.offload(chain(2, salt))
    eventually(lambda: len(works.held) >= 4, "the other tier is written")
    assert value(world.metrics.skipped, "b", "queue") > 0
    assert calls_s < 1.0, "the call did not wait for the tier that hangs"
    door.open()
    world.stack.close()
    assert works.closed
    assert hangs.closed


def test_a_failing_tier_is_a_miss() -> None:
    with TierWorld(DictTier(broken="out")) as world:
        assert world.restored(chain(3)) == 0
        world.offload(chain(3))
        assert world.restored(chain(3)) == 3


def test_a_tier_whose_call_takes_too_long_is_not_waited_for() -> None:
    """The first prefetch waits until its deadline; later ones are over at once, with what the others have."""
    door, hashes, clock = Door(), chain(4), ManualClock()
    hangs = DictTier("a", before=lambda call: door.wait() if call == "has" else None)
    works = DictTier("b", held={key: bytes(frame_of(key)) for key in keys_of(hashes)[:2]})
    with TierWorld(hangs, works, clock=clock, slow_s=2.0) as world:
        first = world.stack.prefetch(hashes, deadline_s=1.0)
        assert door.waiting.wait(5)
        clock.advance(3.0)
        assert first.poll().over
        assert [tier.reason for tier in world.stack.status()] == ["", "a call takes longer than 2.0 s", ""]
        assert world.prefetch(hashes).poll().ready == 2
        door.open()
        eventually(lambda: world.stack.status()[1].reason.startswith("read: a read took 3.0 s"), "it is off")


def test_a_ticket_says_when_it_is_over() -> None:
    clock, door, hashes = SystemClock(), Door(), chain(2)
    tier = DictTier(before=lambda call: door.wait() if call == "has" else None)
    said: list[str] = []
    with TierWorld(tier, clock=clock) as world:
        late = world.stack.prefetch(hashes, deadline_s=clock.now() + 0.2)
        late.on_over(lambda: said.append("late"))
        taken = world.stack.prefetch(hashes, deadline_s=clock.now() + 0.2)
        taken.on_over(lambda: said.append("taken"))
        taken.release()
        eventually(lambda: said == ["late"], "the deadline ends it, and nobody polled")
        late.on_over(lambda: said.append("at once"))
        assert said == ["late", "at once"]
        door.open()
        world.offload(hashes)
        for ticket in (world.stack.prefetch(hashes, deadline_s=9e9), world.prefetch(chain(3))):
            ticket.on_over(lambda: said.append("ready"))
            ticket.release()
        assert said == ["late", "at once", "ready", "ready"]


def test_a_copy_says_when_it_is_done_and_holds_nothing_then() -> None:
    door, hashes = Door(), chain(4)
    free: list[int] = []
    with TierWorld(host_pages=4, blocks=lambda pool: Held(pool, door)) as world:
        copy = world.stack.offload(hashes, [PageId(page) for page in range(4)])
        copy.on_done(lambda: free.append(len(world.stack._pool._idle)))
        assert door.waiting.wait(5)
        assert free == []
        door.open()
        eventually(lambda: free == [4], "all of its pages could make room")
        copy.on_done(lambda: free.append(0))
        assert free == [4, 0]


def test_a_copy_that_is_cancelled_begins_no_further_page() -> None:
    door = Door()
    with TierWorld(blocks=lambda pool: Held(pool, door)) as world:
        copy = world.stack.offload(chain(4), [PageId(page) for page in range(4)])
        assert door.waiting.wait(5)
        copy.cancel()
        assert not copy.done()
        door.open()
        assert waited(copy).pages == 1


# ---- sessions --------------------------------------------------------------------------------------------------------
def test_a_pinned_turn_is_restored_after_much_else_was_used() -> None:
    turn, session = chain(4), SessionId("tenant", "chat")
    with TierWorld(host_pages=8) as world:
        world.offload(turn)
        assert world.stack.pin(session, turn, ttl_s=60, quota_bytes=4 * FRAME_BYTES) == 4
        for salt in range(1, 6):
            world.offload(chain(8, salt), first=8)
        assert world.restored(turn) == 4
        world.stack.unpin(session)
        world.stack.evict_soon(turn)
        world.offload(chain(8, salt=7), first=8)
        assert world.restored(turn) == 0


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_closing_writes_what_waits_and_copies_no_more() -> None:
    tier, door = DictTier(), Door()
    world = TierWorld(tier, host_pages=40, blocks=lambda pool: Held(pool, door))
    first = world.stack.offload(chain(4), [PageId(page) for page in range(4)])
    second = world.stack.offload(chain(4, salt=1), [PageId(page) for page in range(4)])
    assert door.waiting.wait(5)
    closing = threading.Thread(target=world.stack.close)
    closing.start()
    eventually(lambda: world.stack._copier._closing, "it closes")
    door.open()
    closing.join(5)
    assert first.done()
    assert second.done()
    assert (first.pages, second.pages) == (1, 0)
    assert list(tier.held) == keys_of(chain(1))
    assert tier.closed
    late = world.stack.offload(chain(1, salt=2), [PageId(0)])
    assert (late.done(), late.pages) == (True, 0)
    assert world.stack.prefetch(chain(2, salt=2), deadline_s=9e9).poll().over


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_calls_never_restores_a_wrong_page(seed: int) -> None:
    """With two small tiers, one of which damages what it holds and fails now and then."""
    random = Random(seed)
    good, bad = DictTier("good", room=12), DictTier("bad")
    with TierWorld(good, bad, host_pages=6, retry_s=1.0) as world:
        for _ in range(25):
            salt, pages = random.randrange(3), random.randrange(1, 7)
            hashes, first = chain(pages, salt), 8 * salt
            match random.randrange(6):
                case 0 | 1:
                    world.offload(hashes, first)
                case 2 | 3:
                    world.restored(hashes, first)
                case 4:
                    for key, frame in list(bad.held.items()):
                        raw = bytearray(frame)
                        raw[random.randrange(len(raw))] ^= 4
                        bad.held[key] = bytes(raw[: random.choice([len(raw), 99])])
                    bad.broken = random.choice(["", "out"])
                    good.held.pop(random.choice([*good.held, b""]), None)
                    world.clock.advance(1)
                case 5:
                    world.stack.pin(SessionId("o", str(salt)), hashes, ttl_s=2, quota_bytes=3 * FRAME_BYTES)


# ---- what can be asked for -------------------------------------------------------------------------------------------
def opened(world: TierWorld, **settings: object) -> TierStack | None:
    return open_tiers(
        TierConfig(**settings),
        namespace=NAMESPACE,
        blocks=HostBlocks(world.pool, LAYOUT),
        host="127.0.0.1",
        clock=SystemClock(),
        metrics=metrics(),
    )


def test_the_configuration_names_the_tiers(tmp_path: Path) -> None:
    with TierWorld() as world:
        assert opened(world) is None
        stack = opened(world, host_bytes=1 << 20, folder=str(tmp_path))
        assert stack is not None
        copy = stack.offload(chain(3), [PageId(page) for page in range(3)])
        eventually(copy.done, "copied")
        stack.close()
        assert len(list(tmp_path.rglob("*.page"))) == 3
        with pytest.raises(ValueError, match="set host_bytes"):
            opened(world, folder=str(tmp_path))
        with pytest.raises(ValueError, match="host_bytes is 1, a page takes 2112; set at least 8448"):
            opened(world, host_bytes=1)


def test_blocks_must_make_digests_that_a_host_can_verify() -> None:
    def other(pool: torch.Tensor) -> Blocks:
        blocks = HostBlocks(pool, LAYOUT)
        blocks.digests = (MULTILINEAR,)
        return blocks

    with pytest.raises(ValueError, match="xxh3_64, the pool's blocks make multilinear_64"):
        TierWorld(blocks=other)
