"""The host pool and what sessions pin in it."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.kv_tiers import FRAME_BYTES, chain, metrics, value

from baton_common.clock import ManualClock
from baton_common.ids import PageHash
from baton_kvtransfer.tiers import SessionId
from baton_kvtransfer.tiers.pins import Pins
from baton_kvtransfer.tiers.pool import Frame, HostPool

SESSION = SessionId("tenant", "chat")
PLENTY = 1 << 30


class Pool:
    """A host pool of so many frames, and its clock."""

    def __init__(self, frames: int, pinned_fraction: float = 1.0) -> None:
        self.clock, self.metrics = ManualClock(), metrics()
        self.pool = HostPool(
            frames * FRAME_BYTES,
            frame_bytes=FRAME_BYTES,
            pinned_fraction=pinned_fraction,
            clock=self.clock,
            metrics=self.metrics,
        )

    def fill(self, pages: list[PageHash]) -> list[PageHash]:
        """Those for which there was room, in a frame that nobody holds."""
        frames = [frame for frame in map(self.pool.claim, pages) if frame is not None]
        for frame in frames:
            self.pool.commit(frame)
        self.pool.release_all(frames)
        return [frame.page for frame in frames]

    def here(self, pages: list[PageHash]) -> list[PageHash]:
        missing = set(self.pool.missing(pages))
        return [page for page in pages if page not in missing]


def test_the_end_of_a_chain_makes_room_before_its_beginning() -> None:
    world, pages = Pool(4), chain(4)
    world.fill(pages)
    world.fill(chain(2, salt=1))
    assert world.here(pages) == pages[:2]
    assert value(world.metrics.evictions, "host") == 2


def test_what_was_used_lately_stays() -> None:
    world = Pool(4)
    old, new = chain(2), chain(2, salt=1)
    world.fill(old)
    world.fill(new)
    world.pool.release_all(world.pool.hold(old))
    world.fill(chain(2, salt=2))
    assert world.here(old) == old
    assert not world.here(new)


def test_a_held_frame_is_nobody_elses() -> None:
    world, pages = Pool(4), chain(4)
    world.fill(pages)
    held = world.pool.hold(pages[:3])
    assert [frame.page for frame in held] == pages[:3]
    assert len(world.fill(chain(1, salt=1))) == 1
    assert world.pool.claim(chain(1, salt=2)[0]) is not None
    assert world.pool.claim(chain(1, salt=3)[0]) is None, "three frames are held, one is being filled"


def test_a_frame_that_is_being_filled_is_not_found_and_not_claimed_twice() -> None:
    world, (page,) = Pool(4), chain(1)
    frame = world.pool.claim(page)
    assert frame is not None
    assert world.pool.claim(page) is None
    assert world.pool.hold([page]) == []
    assert world.pool.missing([page]) == [], "but it is on its way"
    world.pool.discard(frame)
    assert world.pool.missing([page]) == [page]


def test_a_damaged_frame_is_not_found_again_and_its_memory_returns_once_nobody_reads_it() -> None:
    world, (page,) = Pool(4), chain(1)
    world.fill([page])
    (reader,), (other,) = world.pool.hold([page]), world.pool.hold([page])
    world.pool.forget(reader)
    assert world.pool.hold([page]) == []
    assert len(world.fill(chain(4, salt=1))) == 3
    world.pool.release_all([reader])
    world.pool.forget(other)
    world.pool.release_all([other])
    assert len(world.fill(chain(4, salt=1))) == 1


def test_a_hint_makes_pages_go_first() -> None:
    world, old, new = Pool(4), chain(2), chain(2, salt=1)
    world.fill(old)
    world.fill(new)
    world.pool.demote(new)
    world.fill(chain(1, salt=2))
    assert world.here([*old, *new]) == [*old, new[0]]


def test_a_pool_too_small_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"host_bytes is 6336, a page takes 2112; set at least 8448"):
        Pool(3)


def test_pinned_pages_outlive_others_until_their_time_is_over() -> None:
    world, pages = Pool(4), chain(2)
    world.fill(pages)
    assert world.pool.pin(SESSION, pages, ttl_s=60, quota_bytes=PLENTY) == 2
    for salt in range(1, 5):
        world.fill(chain(2, salt))
    assert world.here(pages) == pages
    assert value(world.metrics.pinned) == 2
    world.clock.advance(60)
    assert len(world.fill(chain(4, salt=9))) == 4
    assert not world.here(pages)
    assert value(world.metrics.pinned) == 0


def test_pages_can_be_pinned_before_they_come() -> None:
    world, pages = Pool(4), chain(2)
    world.pool.pin(SESSION, pages, ttl_s=60, quota_bytes=PLENTY)
    world.fill(pages)
    world.pool.demote(pages)
    world.fill(chain(4, salt=1))
    assert world.here(pages) == pages
    world.pool.unpin(SESSION)
    world.fill(chain(4, salt=2))
    assert not world.here(pages)


def test_an_owner_pins_as_much_as_its_quota_and_counts_shared_pages_once() -> None:
    world, pages = Pool(8), chain(4)
    quota = 3 * FRAME_BYTES
    assert world.pool.pin(SESSION, pages, ttl_s=60, quota_bytes=quota) == 3
    assert world.pool.pin(SessionId("tenant", "other"), pages[:3], ttl_s=60, quota_bytes=quota) == 3
    assert world.pool.pin(SessionId("tenant", "third"), chain(1, salt=1), ttl_s=60, quota_bytes=quota) == 0
    assert world.pool.pin(SessionId("somebody", "chat"), chain(1, salt=1), ttl_s=60, quota_bytes=quota) == 1
    world.clock.advance(60)
    assert world.pool.pin(SessionId("tenant", "third"), chain(1, salt=1), ttl_s=60, quota_bytes=quota) == 1


def test_sessions_leave_room_for_others() -> None:
    world = Pool(8, pinned_fraction=0.5)
    assert world.pool.pin(SESSION, chain(8), ttl_s=60, quota_bytes=PLENTY) == 4


def test_a_turn_that_goes_on_costs_its_new_pages_only() -> None:
    class Counting(list):
        seen = 0

        def __getitem__(self, index):
            pages = super().__getitem__(index)
            Counting.seen += len(pages) if isinstance(index, slice) else 1
            return pages

    pins, pages = Pins(1000), Counting(chain(900))
    for turn in range(1, 10):
        Counting.seen = 0
        so_far = Counting(list.__getitem__(pages, slice(0, 100 * turn)))
        change = pins.pin(SESSION, so_far, expires_s=turn, quota_pages=1000)
        assert (len(change.pinned), change.held, change.released) == (100, 100 * turn, [])
        assert Counting.seen <= 101


def test_another_chain_takes_the_place_of_the_first() -> None:
    pins = Pins(100)
    first, other = chain(4), chain(3, salt=1)
    pins.pin(SESSION, first, expires_s=1, quota_pages=10)
    change = pins.pin(SESSION, other, expires_s=1, quota_pages=10)
    assert (set(change.released), change.pinned) == (set(first), other)
    assert pins.pin(SESSION, other[:1], expires_s=1, quota_pages=10).held == 1
    assert pins.pages == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 3), st.integers(0, 6)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_sequence_of_sessions_keeps_quota_capacity_and_counts(
    steps: list[tuple[int, int, int, int]],
) -> None:
    """Against the plain definition: a page is pinned when some living session of some owner has it in its chain."""
    pins, now_s = Pins(8), 0.0
    living: dict[SessionId, tuple[float, list[PageHash]]] = {}
    for act, owner, name, length in steps:
        session, pages, quota = SessionId(str(owner), str(name)), chain(length, salt=name % 2), 3 + owner
        if act < 3:
            change = pins.pin(session, pages, expires_s=now_s + act + 1, quota_pages=quota)
            living[session] = (now_s + act + 1, pages[: change.held])
            assert change.held == length or pins.owned(str(owner)) == quota or pins.pages == 8
        elif act == 3:
            pins.unpin(session)
            living.pop(session, None)
        else:
            now_s += 1
            pins.expire(now_s)
            living = {key: entry for key, entry in living.items() if entry[0] > now_s}
        held = {page for _, pages in living.values() for page in pages}
        assert pins.pages == len(held) <= 8
        assert all(pins.pinned(page) for page in held)
        for owner_name in "012":
            mine = {page for key, (_, pages) in living.items() if key.owner == owner_name for page in pages}
            assert pins.owned(owner_name) == len(mine) <= 3 + int(owner_name)


@given(st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_calls_never_gives_a_held_or_pinned_frame_to_somebody_else(seed: int) -> None:
    random, world = Random(seed), Pool(6, pinned_fraction=0.5)
    universe = [page for salt in range(3) for page in chain(4, salt)]
    held: list[Frame] = []
    filling: list[Frame] = []
    for _ in range(60):
        match random.randrange(8):
            case 0 | 1:
                if frame := world.pool.claim(random.choice(universe)):
                    frame.view[:16] = frame.page
                    filling.append(frame)
            case 2 if filling:
                frame = filling.pop(random.randrange(len(filling)))
                world.pool.commit(frame)
                held.append(frame)
            case 3 if filling:
                world.pool.discard(filling.pop())
            case 4:
                held += world.pool.hold(chain(random.randrange(5), random.randrange(3)))
            case 5 if held:
                world.pool.release_all([held.pop(random.randrange(len(held)))])
            case 6:
                session = SessionId("o", str(random.randrange(2)))
                world.pool.pin(session, chain(2, random.randrange(3)), ttl_s=random.randrange(1, 9), quota_bytes=PLENTY)
            case 7:
                world.clock.advance(1)
                world.pool.demote(random.sample(universe, 2))
        used = {frame.index for frame in held + filling}
        assert len({frame.page for frame in held + filling}) >= len(used), "one frame, one page"
        assert all(bytes(frame.view[:16]) == frame.page for frame in held + filling)
    world.pool.release_all(held)
    for frame in filling:
        world.pool.discard(frame)
    world.clock.advance(10)
    assert len(world.fill([page for salt in range(7, 10) for page in chain(2, salt)])) == 6, "no frame is lost"
