"""The transport probe: what proves a pair, what breaks it, and what says nothing of it. Real gRPC, scripted workers."""

from __future__ import annotations

import asyncio

import pytest
from router.conftest import House, eventually
from router.fake_worker import FakeWorker, Script, fault

from baton_common.hashing import page_hashes, salted_root, tokens_from_bytes
from baton_common.ids import PageHash
from baton_proto import worker_pb2 as wire
from baton_router.links import SUSPECT_S, Link
from baton_router.probe import PAGES, ProbeResult, probe

VOCABULARY = 320
PAGE_TOKENS = 16


async def pair_of(house: House) -> tuple[FakeWorker, FakeWorker]:
    prefill, decode = await house.pair(page_tokens=PAGE_TOKENS)
    for worker in (prefill, decode):
        worker.compat.layers, worker.compat.kv_heads, worker.compat.head_dim = 3, 2, 8
        worker.compat.kv_dtype = "bfloat16"
    await house.route()
    return prefill, decode


def links(house: House) -> tuple[Link, Link]:
    assert house.router is not None
    prefill, decode = house.router.fleet.links
    return prefill, decode


async def ask(house: House, *, deadline_s: float = 10.0) -> ProbeResult:
    result = await probe(*links(house), vocab_size=VOCABULARY, deadline_s=deadline_s)
    assert not any(link.open_legs or link.queued_tokens for link in links(house)), "a leg was left open"
    return result


async def nothing_is_reserved(house: House) -> None:
    await eventually(lambda: not house.cluster.reserved, "the reservation was given back")
    await eventually(lambda: not any(worker.running for worker in house.workers), "nothing runs")


async def test_a_handoff_that_worked_is_the_proof(house: House) -> None:
    await pair_of(house)
    result = await ask(house)
    assert result.ok
    tokens = PAGES * PAGE_TOKENS + 1
    assert result.bytes == tokens * 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, dim, bytes of bfloat16
    assert result.seconds >= 0
    assert house.workers[1].worker_id in result.message
    await nothing_is_reserved(house)
    assert not any(worker.aborts for worker in house.workers), "both had their last word"


async def test_it_asks_for_a_handoff_and_for_nothing_else(house: House) -> None:
    prefill, decode = await pair_of(house)
    await ask(house)
    (reserve,), (handed,) = decode.submits, prefill.submits
    assert reserve.mode == wire.SUBMIT_MODE_RESERVE
    assert reserve.local_below_tokens == 0
    assert handed.mode == wire.SUBMIT_MODE_PREFILL
    assert handed.ticket.transfer_id.startswith(decode.incarnation)
    assert handed.tokens == reserve.tokens
    assert all(0 <= token < VOCABULARY for token in tokens_from_bytes(reserve.tokens))
    assert (reserve.sampling.max_tokens, reserve.sampling.ignore_eos, reserve.sampling.temperature) == (2, True, 0.0)
    assert 0 < reserve.deadline_ms <= 10_000


async def test_no_probe_can_find_the_pages_of_another(house: House) -> None:
    _, decode = await pair_of(house)
    await ask(house)
    await ask(house)
    first, second = decode.submits
    assert first.cache_salt
    assert first.cache_salt != second.cache_salt
    assert first.tokens != second.tokens
    assert first.request_id != second.request_id


async def test_a_short_context_gets_a_short_prompt(house: House) -> None:
    _, decode = await house.pair(context_tokens=20)
    await house.route()
    assert (await ask(house)).ok
    assert len(tokens_from_bytes(decode.submits[0].tokens)) == 18


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("overloaded", "busy"), ("draining", "busy"), ("transfer", "failed"), ("internal", "failed"),
        ("incompatible", "failed"), ("invalid", "failed"),
    ],
)  # fmt: skip
async def test_a_refusal_is_told_in_the_workers_words(house: House, role: str, kind: str, verdict: str) -> None:
    prefill, decode = await pair_of(house)
    refusing = prefill if role == "prefill" else decode
    refusing.script.refuse_always = fault(kind, "because of the weather")
    result = await ask(house)
    assert (result.verdict, result.seconds, result.bytes) == (verdict, 0.0, 0)
    assert f"{role} worker {refusing.worker_id}" in result.message
    assert "because of the weather" in result.message
    await nothing_is_reserved(house)


async def test_a_transfer_that_fails_after_the_first_token_is_a_failure(house: House) -> None:
    prefill, decode = await pair_of(house)
    house.cluster.reserved = Forgetful()
    result = await ask(house)
    assert result.verdict == "failed"
    assert "the receiver is gone" in result.message
    assert prefill.worker_id in result.message
    await eventually(lambda: bool(decode.aborts), "decode was told")


class Forgetful(dict):  # type: ignore[type-arg]
    """Reservations that nobody can redeem."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


@pytest.mark.parametrize(
    ("role", "script", "words"),
    [
        ("prefill", Script(hold=True), "token #1 of prefill worker"),
        ("prefill", Script(hold_handoff=True), "the KV on decode worker"),
        ("decode", Script(hold=True), "the KV on decode worker"),
    ],
)
async def test_the_deadline_says_what_never_came(house: House, role: str, script: Script, words: str) -> None:
    prefill, decode = await pair_of(house)
    (prefill if role == "prefill" else decode).script = script
    result = await ask(house, deadline_s=0.5)
    assert result.verdict == "failed"
    assert words in result.message
    script.hold = False
    await nothing_is_reserved(house)


async def test_a_prefill_worker_with_a_queue_is_busy_and_not_broken(house: House) -> None:
    prefill, _ = await pair_of(house)
    prefill.script.hold = True
    prefill.load.queued_requests = 5
    await eventually(lambda: links(house)[0].load.queued_requests == 5, "the router knows")
    result = await ask(house, deadline_s=0.5)
    assert result.verdict == "busy"
    assert prefill.worker_id in result.message


async def test_pages_that_arrived_are_proof_even_when_decode_has_no_row_for_the_next_token(house: House) -> None:
    prefill, decode = await pair_of(house)
    decode.script.hold = True
    asked = asyncio.create_task(ask(house, deadline_s=2.0))
    await eventually(lambda: bool(prefill.submits), "decode reserved")
    submit = decode.submits[0]
    root = salted_root(PageHash(decode.hash_root), submit.cache_salt)
    pages = page_hashes(root, tokens_from_bytes(submit.tokens), PAGE_TOKENS)
    assert len(pages) == PAGES
    decode.send_kv(decode.streams[0], stored=b"".join(pages))
    result = await asked
    assert result.ok
    assert "no free row" in result.message
    await eventually(lambda: bool(decode.aborts), "decode was told")


@pytest.mark.parametrize("role", [0, 1])
async def test_a_lost_worker_is_a_failure_at_once(house: House, role: int) -> None:
    prefill, _ = await pair_of(house)
    prefill.script.hold = True
    asked = asyncio.create_task(ask(house, deadline_s=60.0))
    await eventually(lambda: bool(prefill.submits), "both have it")
    await house.workers[role].stop()
    result = await asked
    assert result.verdict == "failed"
    assert house.workers[role].worker_id in result.message
    assert "lost" in result.message


async def test_a_silent_worker_is_a_failure_before_the_deadline(house: House) -> None:
    prefill, _ = await pair_of(house)
    prefill.script.silent = True
    asked = asyncio.create_task(ask(house, deadline_s=60.0))
    await eventually(lambda: bool(prefill.submits), "both have it")
    links(house)[0]._heard_at_s -= SUSPECT_S  # as if it had been silent for so long
    result = await asked
    assert result.verdict == "failed"
    assert "sign of life" in result.message


async def test_workers_that_cannot_take_it_are_not_asked(house: House) -> None:
    prefill, decode = await pair_of(house)
    decode.load.free_pages = 2
    await eventually(lambda: links(house)[1].load.free_pages == 2, "the router knows")
    assert (await ask(house)).verdict == "busy"
    decode.load.free_pages = 1000
    prefill.load.draining = True
    await eventually(lambda: links(house)[0].load.draining, "the router knows")
    assert (await ask(house)).verdict == "busy"
    await prefill.stop()
    await eventually(lambda: not links(house)[0].up, "the router knows")
    result = await ask(house)
    assert result.verdict == "failed"
    assert "not connected" in result.message
    assert not decode.submits


async def test_a_decode_worker_without_peers_is_named(house: House) -> None:
    _, decode = await pair_of(house)
    decode.cached_tokens = 1 << 20  # makes the fake do everything itself
    result = await ask(house)
    assert result.verdict == "failed"
    assert "takes no KV from others" in result.message


async def test_a_probe_that_is_cancelled_gives_everything_back(house: House) -> None:
    prefill, decode = await pair_of(house)
    prefill.script.hold = True
    asked = asyncio.create_task(ask(house))
    await eventually(lambda: bool(prefill.submits), "both have it")
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not any(link.open_legs for link in links(house))
    await eventually(lambda: bool(prefill.aborts and decode.aborts), "both were told")


async def test_a_defect_is_a_failure_and_no_exception(house: House) -> None:
    await pair_of(house)
    prefill, decode = links(house)
    result = await probe(prefill, decode, vocab_size=0)
    assert result.verdict == "failed"
    assert "internal error" in result.message
    assert not decode.open_legs
