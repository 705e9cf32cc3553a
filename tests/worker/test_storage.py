"""Tiers under a worker's pool: what fills a prompt, what a finished turn keeps, what the status says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from support.kv_tiers import FRAME_BYTES, LAYOUT, POOL_PAGES, DictTier, Door, TierWorld, chain, frame_of, keys_of
from support.kv_world import LIMIT_S, eventually

from baton_common.clock import ManualClock, SystemClock
from baton_common.errors import BatonError, ConfigError
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import Keep, Mode, Request, SamplingParams
from baton_kvtransfer.blocks import HostBlocks
from baton_proto.common_pb2 import Compat
from baton_worker.filling import Filling
from baton_worker.storage import Storage, TierSource, open_storage
from baton_worker.tiering import parse_tiers

PAGE = LAYOUT.page_tokens
TARGET = 40  # pages of the pool that are filled
ID = RequestId("r")


def request(keep: Keep | None = None, hashes: Sequence[PageHash] = ()) -> Request:
    made = Request(
        request_id=ID,
        mode=Mode.LOCAL,
        tokens=[1] * 200,
        prompt_tokens=200,
        sampling=SamplingParams(),
        deadline_s=1e12,
        arrival_s=0.0,
        keep=keep,
    )
    made.hashes = list(hashes)
    return made


def storage_of(world: TierWorld, *, session_pages: int = 100) -> Storage:
    return Storage(world.stack, page_tokens=PAGE, session_bytes=session_pages * FRAME_BYTES, clock=world.clock)


class Answers(list[int]):
    """What a source said."""

    def wait(self) -> int:
        eventually(lambda: len(self) > 0, "the source answers")
        return self[0]


def fill(source: TierSource, hashes: Sequence[PageHash], first_token: int = 0) -> Answers:
    """Into pages TARGET, … of the pool."""
    answers = Answers()
    pages = [PageId(TARGET + index) for index in range(len(hashes) + 1)]
    filling = Filling(request=request(), pages=pages, hashes=hashes, page_tokens=PAGE)
    source.fill(filling, first_token, answers.append)
    return answers


# ---- filling ---------------------------------------------------------------------------------------------------------
def test_a_prompt_is_filled_from_host_memory() -> None:
    hashes = chain(6)
    with TierWorld() as world:
        storage = storage_of(world)
        world.offload(hashes)
        world.pool[TARGET:] = -1
        assert fill(storage.source(), hashes).wait() == 6 * PAGE
        assert torch.equal(world.pool[TARGET : TARGET + 6], world.pool[:6])
        assert bool((world.pool[TARGET + 6 :] == -1).all())


def test_it_begins_where_kv_ends_and_stops_where_nothing_is_known() -> None:
    hashes = chain(6)
    with TierWorld() as world:
        storage = storage_of(world)
        world.offload(hashes[:4])
        world.pool[TARGET:] = -1
        assert fill(storage.source(), hashes, 2 * PAGE).wait() == 4 * PAGE
        assert torch.equal(world.pool[TARGET + 2 : TARGET + 4], world.pool[2:4])
        assert bool((world.pool[TARGET : TARGET + 2] == -1).all())
        assert bool((world.pool[TARGET + 4 :] == -1).all())
        assert fill(storage.source(), hashes, 4 * PAGE).wait() == 4 * PAGE


def test_pages_of_a_lower_tier_are_waited_for() -> None:
    hashes, door = chain(4), Door()
    tier = DictTier(held={key: bytes(frame_of(key, 7)) for key in keys_of(hashes)})
    tier.before = lambda call: door.wait() if call == "get" else None
    with TierWorld(tier) as world:
        answers = fill(storage_of(world).source(), hashes)
        assert door.waiting.wait(LIMIT_S)
        assert answers == []
        door.open()
        assert answers.wait() == 4 * PAGE


def test_a_tier_that_hangs_costs_a_prompt_its_deadline() -> None:
    """Nobody polls: the stack's own clock ends it."""
    hashes, door = chain(4), Door()
    tier = DictTier(before=lambda call: door.wait() if call == "has" else None)
    with TierWorld(tier, clock=SystemClock()) as world:
        world.offload(hashes[:2])
        answers = fill(storage_of(world).source(), hashes)
        assert answers.wait() == 2 * PAGE
        door.open()


def test_damage_shortens_the_answer() -> None:
    hashes = chain(4)
    with TierWorld() as world:
        world.offload(hashes)
        (frame,) = world.stack._pool.hold(hashes[2:3])
        frame.view[200] ^= 1
        world.stack._pool.release_all([frame])
        assert fill(storage_of(world).source(), hashes).wait() == 2 * PAGE


def test_stop_before_the_pages_are_there_writes_nothing() -> None:
    hashes, door = chain(4), Door()
    tier = DictTier(held={key: bytes(frame_of(key)) for key in keys_of(hashes)})
    tier.before = lambda call: door.wait() if tier.calls.count("get") == 2 else None
    with TierWorld(tier, host_pages=4) as world:
        source = storage_of(world).source()
        world.pool[TARGET:] = -1
        answers = fill(source, hashes)
        assert door.waiting.wait(LIMIT_S)
        assert source.stop(ID).done()
        door.open()
        pool = world.stack._pool
        eventually(lambda: len(pool._free) + len(pool._idle) == 4, "nothing is held")
        assert bool((world.pool[TARGET:] == -1).all())
        assert answers == []
        assert source.stop(ID).done(), "stop may come again"


class HeldScatter(HostBlocks):
    """Waits at a door before it writes the second page."""

    def __init__(self, pool: torch.Tensor, door: Door) -> None:
        super().__init__(pool, LAYOUT)
        self._door = door
        self._calls = 0

    def scatter(self, *call: object, **named: object) -> bool:
        self._calls += 1
        if self._calls == 2:
            self._door.wait()
        return super().scatter(*call, **named)


def test_stop_while_pages_are_written_has_a_fence() -> None:
    hashes, door = chain(4), Door()
    with TierWorld(blocks=lambda pool: HeldScatter(pool, door)) as world:
        source = storage_of(world).source()
        world.offload(hashes)
        world.pool[TARGET:] = -1
        answers = fill(source, hashes)
        assert door.waiting.wait(LIMIT_S)
        fence = source.stop(ID)
        assert not fence.done()
        door.open()
        eventually(fence.done, "the page that was being written is written")
        assert bool((world.pool[TARGET + 2 :] == -1).all()), "no other is"
        assert answers == []


def test_pages_hold_still_while_they_are_kept() -> None:
    with TierWorld() as world:
        storage, pages = storage_of(world), [PageId(0), PageId(1)]
        fence = storage.keep_pages(chain(2), pages)
        eventually(lambda: fence is None or fence.done(), "kept")
        assert storage.keep_pages(chain(2), pages) is None, "nothing is copied twice"


# ---- sessions --------------------------------------------------------------------------------------------------------
def finish_turn(storage: Storage, hashes: Sequence[PageHash], session: str = "chat", tenant: str = "t") -> None:
    storage.keep_session(request(Keep(session=session, ttl_s=60.0, tenant=tenant), hashes))


def kept(world: TierWorld, hashes: Sequence[PageHash]) -> int:
    """How many leading pages of a chain survive that much else is used."""
    for salt in range(90, 96):
        world.offload(chain(8, salt), first=8)
    return world.restored(hashes)


def test_a_finished_turn_stays_until_its_session_ends() -> None:
    turn = chain(4)
    with TierWorld(host_pages=8) as world:
        storage = storage_of(world)
        world.offload(turn)
        finish_turn(storage, turn)
        assert kept(world, turn) == 4
        storage.end_session("t", "chat")
        assert kept(world, turn) == 0


def test_the_pages_of_a_session_that_ended_make_room_first() -> None:
    turn, other = chain(4), chain(4, salt=1)
    with TierWorld(host_pages=8) as world:
        storage = storage_of(world)
        world.offload(other, first=8)
        world.offload(turn)
        finish_turn(storage, turn)
        storage.end_session("t", "chat")
        world.offload(chain(4, salt=2), first=16)
        assert world.restored(other, 8) == 4
        assert world.restored(turn) == 0


def test_a_session_of_another_tenant_is_another_one() -> None:
    turn = chain(4)
    with TierWorld(host_pages=8) as world:
        storage = storage_of(world)
        world.offload(turn)
        finish_turn(storage, turn, tenant="a")
        storage.end_session("b", "chat")
        assert kept(world, turn) == 4


def test_tenants_keep_no_more_than_their_quota() -> None:
    turn = chain(4)
    with TierWorld(host_pages=8) as world:
        storage = storage_of(world, session_pages=3)
        world.offload(turn)
        finish_turn(storage, turn)
        assert kept(world, turn) == 3


def test_a_session_ends_with_its_time() -> None:
    turn, clock = chain(4), ManualClock()
    with TierWorld(host_pages=8, clock=clock) as world:
        storage = storage_of(world)
        world.offload(turn)
        finish_turn(storage, turn)
        clock.advance(61.0)
        assert kept(world, turn) == 0


def test_a_request_that_keeps_nothing_pins_nothing() -> None:
    turn = chain(4)
    with TierWorld(host_pages=8) as world:
        world.offload(turn)
        storage_of(world).keep_session(request(None, turn))
        assert kept(world, turn) == 0


# ---- what it says, and what it is made from --------------------------------------------------------------------------
def test_the_status_says_which_tier_is_off_and_why() -> None:
    with TierWorld(DictTier("file"), DictTier("mooncake", broken="out of order")) as world:
        storage = storage_of(world)
        world.restored(chain(1))

        def off() -> bool:
            return [tier.state for tier in storage.status()] == ["on", "on", "off"]

        eventually(off, "the tier is off")
        host, _, store = storage.status()
        assert (host.name, host.bytes) == ("host", 32 * FRAME_BYTES)
        assert (store.name, store.reason) == (
            "mooncake",
            "read: TierFault: out of order; write: TierFault: out of order",
        )


COMPAT = Compat(model_digest="m", compute_dtype="bfloat16", kv_dtype="bfloat16", rope="r", tp_size=1)


FREE_BYTES = 1 << 30


def opened(text: str, *, compat: Compat = COMPAT, host: str = "127.0.0.1") -> Storage | None:
    pool = torch.zeros(LAYOUT.shape(POOL_PAGES), dtype=torch.bfloat16)
    return open_storage(
        parse_tiers(text),
        compat=compat,
        layout=LAYOUT,
        pool_pages=POOL_PAGES,
        blocks=HostBlocks(pool, LAYOUT),
        host=host,
        free_bytes=FREE_BYTES,
        clock=SystemClock(),
        registry=CollectorRegistry(),
    )


def test_no_setting_is_no_storage() -> None:
    assert opened("") is None


@pytest.mark.parametrize(
    ("compat", "found"), [(COMPAT, 3), (Compat(model_digest="m", compute_dtype="float32", rope="r", tp_size=1), 0)]
)
def test_pages_of_a_worker_that_computes_otherwise_are_not_found(compat: Compat, found: int, tmp_path: Path) -> None:
    text, hashes = f"host=1MiB,file={tmp_path}:1MiB", chain(3)
    first = opened(text)
    assert first is not None
    fence = first.keep_pages(hashes, [PageId(page) for page in range(3)])
    eventually(lambda: fence is None or fence.done(), "kept")
    first.close()
    second = opened(text, compat=compat)
    assert second is not None
    assert fill(second.source(), hashes).wait() == found * PAGE
    second.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host=4KiB", "host=4096 does not hold 4 pages of 2112 bytes; write host=8448 or more"),
        ("host=1MiB,file={folder}/file/kv:1MiB", "it cannot be used"),
        ("host=2GiB", "1024 MiB of memory are left, too few for host=2048MiB; write host=1024MiB or less"),
        ("host=1000MiB,mooncake=127.0.0.1:1:256MiB", "the 256 MiB that mooncake lends; write host=768MiB or less"),
        ("host=1MiB,mooncake=127.0.0.1:1:2GiB", "host=1MiB beside the 2048 MiB that mooncake lends; lend less"),
    ],
)
def test_what_cannot_work_here_is_refused_with_the_remedy(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=says) as refusal:
        opened(text.format(folder=tmp_path))
    assert refusal.value.param == "tiers"
    assert str(refusal.value).startswith("--tiers")


def test_memory_that_is_lent_needs_an_address_that_others_can_dial() -> None:
    with pytest.raises(ConfigError, match=r"at 0\.0\.0\.0; set --peer-advertise"):
        opened("host=1MiB,mooncake=127.0.0.1:1:0", host="0.0.0.0")


def test_a_missing_library_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(BatonError, match=r"pip install 'baton\[mooncake\]'"):
        opened("host=1MiB,mooncake=127.0.0.1:1:0")
