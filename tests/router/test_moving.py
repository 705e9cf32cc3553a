"""A decode worker drains: its requests go on elsewhere and no client notices; whatever fails is an ordinary retry."""

from __future__ import annotations

import asyncio

import pytest
from router.conftest import House, eventually
from router.fake_worker import FakeWorker, expected, fault
from router.test_flight import PROMPT, Kept, fly, modes

from baton_common.hashing import tokens_from_bytes
from baton_proto import worker_pb2 as wire

TOKENS = 120


async def landed(kept: Kept) -> None:
    async with asyncio.timeout(60):
        await kept.over.wait()


def complete(kept: Kept) -> bool:
    return kept.error is None and kept.ids == expected(PROMPT, TOKENS)


def migrations(house: House, outcome: str) -> float:
    assert house.router is not None
    registry = house.router.metrics.registry
    return registry.get_sample_value("baton_router_migrations_total", {"outcome": outcome}) or 0.0


async def flying(house: House, *, decodes: int = 2) -> tuple[FakeWorker, list[FakeWorker], FakeWorker, Kept]:
    """(prefill worker, other decode workers, the one that decodes, what the client has); a few tokens are out."""
    prefill = await house.add(wire.ROLE_PREFILL, tick_s=0.01)
    workers = [await house.add(wire.ROLE_DECODE, tick_s=0.01) for _ in range(decodes)]
    await house.route()
    _, kept = fly(house, max_tokens=TOKENS)
    await eventually(lambda: len(kept.ids) > 3, "decode is at it")
    source = next(worker for worker in workers if worker.running)
    return prefill, [worker for worker in workers if worker is not source], source, kept


async def test_a_request_moves_and_is_not_computed_again(house: House) -> None:
    prefill, (target,), source, kept = await flying(house)
    source.load.draining = True
    await landed(kept)
    assert complete(kept)
    assert modes(source) == ["RESERVE", "PREFILL"]
    assert modes(target) == ["RESERVE"]
    assert modes(prefill) == ["PREFILL"]
    assert source.submits[1].ticket.transfer_id.startswith(target.incarnation)
    assert [handle for handle, _, _ in source.aborts] == [source.submits[0].handle]
    assert migrations(house, "moved") == 1
    assert migrations(house, "failed") == 0


async def test_what_the_old_worker_makes_meanwhile_is_heard_once(house: House) -> None:
    _, (target,), source, kept = await flying(house)
    target.script.hold_tickets = True
    source.load.draining = True
    await eventually(lambda: bool(target.submits), "room is asked for")
    reserved = len(tokens_from_bytes(target.submits[0].tokens)) - len(PROMPT)
    await eventually(lambda: len(kept.ids) > reserved + 3, "the old worker goes on")
    target.give_tickets()
    await landed(kept)
    assert complete(kept)
    moved = source.submits[1]
    assert tokens_from_bytes(moved.tokens) == tokens_from_bytes(target.submits[0].tokens)
    assert migrations(house, "moved") == 1


async def test_an_answer_that_forks_on_the_other_worker_is_taken_back(house: House) -> None:
    _, (target,), source, kept = await flying(house)
    target.script.hold_tickets = True
    target.function = lambda tokens, prompt_tokens: 7
    source.load.draining = True
    await eventually(lambda: bool(target.submits), "room is asked for")
    reserved = len(tokens_from_bytes(target.submits[0].tokens)) - len(PROMPT)
    await eventually(lambda: len(kept.ids) > reserved + 3, "the old worker goes on")
    told = len(kept.ids)
    target.script.hold_tickets = False
    target.give_tickets()
    await landed(kept)
    assert kept.error is None
    assert len(kept.ids) == TOKENS
    assert kept.ids[:told] == expected(PROMPT, told)
    assert tokens_from_bytes(target.submits[1].tokens)[: len(PROMPT) + told] == [*PROMPT, *kept.ids[:told]]
    assert migrations(house, "failed") == 1


@pytest.mark.parametrize("kind", ["overloaded", "internal"])
async def test_without_room_elsewhere_it_stays_and_asks_again(house: House, kind: str) -> None:
    _, (target,), source, kept = await flying(house)
    target.script.refuse.append(fault(kind, retry_after_ms=20))
    source.load.draining = True
    await landed(kept)
    assert complete(kept)
    assert modes(target) == ["RESERVE", "RESERVE"]
    assert modes(source) == ["RESERVE", "PREFILL"]
    assert (migrations(house, "refused"), migrations(house, "moved")) == (1, 1)


async def test_the_only_decode_worker_finishes_what_it_has(house: House) -> None:
    _, _, source, kept = await flying(house, decodes=1)
    source.load.draining = True
    await landed(kept)
    assert complete(kept)
    assert modes(source) == ["RESERVE"]


async def test_a_worker_without_the_pages_is_not_asked(house: House) -> None:
    _, (target,), source, kept = await flying(house)
    target.load.free_pages = 2
    assert house.router is not None
    links = house.router.fleet.links
    await eventually(lambda: any(link.load.free_pages == 2 for link in links), "the router knows")
    source.load.draining = True
    await landed(kept)
    assert complete(kept)
    assert not target.submits


async def test_the_end_while_room_is_asked_for_gives_the_reservation_back(house: House) -> None:
    _, (target,), source, kept = await flying(house)
    target.script.hold_tickets = True
    source.load.draining = True
    await eventually(lambda: bool(target.submits), "room is asked for")
    await landed(kept)
    assert complete(kept)
    await eventually(lambda: bool(target.aborts), "the reservation was returned")


@pytest.mark.parametrize("lost", ["source", "target"])
async def test_who_dies_while_room_is_asked_for(house: House, lost: str) -> None:
    """The target: it stays. The source: an ordinary retry."""
    prefill, (target, *_), source, kept = await flying(house, decodes=2)
    target.script.hold_tickets = True
    source.load.draining = True
    await eventually(lambda: bool(target.submits), "room is asked for")
    target.script.hold_tickets = False
    await (target if lost == "target" else source).stop()
    await landed(kept)
    assert complete(kept)
    assert len(prefill.submits) == (1 if lost == "target" else 2)


@pytest.mark.parametrize("lost", ["source", "target"])
async def test_who_dies_while_kv_moves(house: House, lost: str) -> None:
    """An ordinary retry: somebody computes it again, on the outputs that the client has."""
    prefill, others, source, kept = await flying(house, decodes=3)
    source.script.hold_handoff = True
    source.load.draining = True
    await eventually(lambda: modes(source) == ["RESERVE", "PREFILL"], "it is on its way")
    target = next(worker for worker in others if worker.submits)
    await (target if lost == "target" else source).stop()
    await landed(kept)
    assert complete(kept)
    assert modes(prefill) == ["PREFILL", "PREFILL"]
    assert tokens_from_bytes(prefill.submits[1].tokens)[: len(PROMPT) + 3] == [*PROMPT, *kept.ids[:3]]
    assert migrations(house, "failed") == 1


async def test_many_streams_leave_at_once(house: House) -> None:
    await house.add(wire.ROLE_PREFILL, tick_s=0.01)
    workers = [await house.add(wire.ROLE_DECODE, tick_s=0.01) for _ in range(3)]
    await house.route()
    prompts = [[*PROMPT, number] for number in range(24)]
    flown = [fly(house, prompt=prompt, max_tokens=TOKENS)[1] for prompt in prompts]
    await eventually(lambda: all(len(kept.ids) > 2 for kept in flown), "all are at it")
    source = workers[0]
    moving = len(source.running)
    assert moving
    source.load.draining = True
    await eventually(lambda: not source.running, "it is empty")
    assert not any(kept.over.is_set() for kept in flown), "they were faster than the drain"
    for kept in flown:
        await landed(kept)
    assert [kept.ids for kept in flown] == [expected(prompt, TOKENS) for prompt in prompts]
    assert migrations(house, "moved") == moving
