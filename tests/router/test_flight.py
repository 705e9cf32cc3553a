"""One choice's life: the way of a request, and every way a worker can fail it. Real gRPC, no HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from router.conftest import House, eventually
from router.fake_worker import FakeWorker, expected, fault

from baton_common.errors import BatonError, DeadlineExceeded, ErrorKind, Overloaded
from baton_common.hashing import HASH_BYTES, page_hashes, token_bytes, tokens_from_bytes
from baton_common.ids import PageHash
from baton_proto import worker_pb2 as wire
from baton_router.flight import MAX_FAILURES, Flight, NoWorker
from baton_router.links import SUSPECT_S, Token
from baton_router.order import Order
from baton_router.tokens import Prompt

PROMPT = list(range(100, 150))


@dataclass
class Kept:
    """A sink that checks order and remembers."""

    ids: list[int] = field(default_factory=list)
    finish: int = 0
    error: BatonError | None = None
    cached: list[int] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_output(self, token: Token) -> None:
        assert not self.over.is_set(), "a token after the end"
        assert token.position == len(self.ids), "a gap or a token twice"
        self.ids.append(token.token_id)
        if token.cached_tokens is not None:
            self.cached.append(token.cached_tokens)
        if token.finish:
            self.finish = token.finish
            self.over.set()

    def on_error(self, error: BatonError) -> None:
        assert not self.over.is_set(), "two ends"
        self.error = error
        self.over.set()


def fly(house: House, *, max_tokens: int = 20, prompt: list[int] | None = None, **changes: Any) -> tuple[Flight, Kept]:
    assert house.router is not None
    ids = PROMPT if prompt is None else prompt
    loop = asyncio.get_running_loop()
    settings: dict[str, Any] = {
        "worker_wait_s": 0.5, "resume_wait_s": 2.0, "local_below_tokens": 0, "deadline_s": loop.time() + 15, **changes,
    }  # fmt: skip
    order = Order(
        request_id="r1",
        prompt=Prompt(ids=tuple(ids), raw=token_bytes(ids), text="", cache_salt=""),
        sampling=wire.Sampling(max_tokens=max_tokens, seed=1),
        **settings,
    )
    kept = Kept()
    flight = Flight(order, house.router.fleet, kept, house.router.metrics)
    flight.start()
    return flight, kept


async def landed(kept: Kept) -> None:
    async with asyncio.timeout(10):
        await kept.over.wait()


def complete(kept: Kept, count: int = 20) -> bool:
    return kept.error is None and kept.ids == expected(PROMPT, count)


def modes(worker: FakeWorker) -> list[str]:
    return [wire.SubmitMode.Name(submit.mode).removeprefix("SUBMIT_MODE_") for submit in worker.submits]


async def test_decode_reserves_first_then_prefill_gets_its_ticket(house: House) -> None:
    prefill, decode = await house.pair()
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert (modes(decode), modes(prefill)) == (["RESERVE"], ["PREFILL"])
    assert prefill.submits[0].ticket.transfer_id.startswith(decode.incarnation)
    assert tokens_from_bytes(prefill.submits[0].tokens) == PROMPT
    assert not decode.aborts
    assert not prefill.aborts


async def test_one_token_needs_no_decode_and_gives_the_reservation_back(house: House) -> None:
    _, decode = await house.pair()
    await house.route()
    _, kept = fly(house, max_tokens=1)
    await landed(kept)
    assert complete(kept, 1)
    await eventually(lambda: bool(decode.aborts), "the reservation was returned")
    assert not house.cluster.reserved


async def test_a_short_uncached_suffix_is_left_to_decode(house: House) -> None:
    prefill, decode = await house.pair()
    decode.cached_tokens = 48
    await house.route()
    _, kept = fly(house, local_below_tokens=16)
    await landed(kept)
    assert complete(kept)
    assert kept.cached == [48]
    assert not prefill.submits


async def test_a_colocated_worker_does_it_alone(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert modes(worker) == ["LOCAL"]


async def test_without_prefill_workers_decode_does_it_alone(house: House) -> None:
    decode = await house.add(wire.ROLE_DECODE)
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert modes(decode) == ["LOCAL"]


async def test_workers_that_do_not_fit_are_never_paired(house: House) -> None:
    prefill = await house.add(wire.ROLE_PREFILL, model_digest="new")
    decode = await house.add(wire.ROLE_DECODE, model_digest="old")
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert not prefill.submits
    assert modes(decode) == ["LOCAL"]


@pytest.mark.parametrize("kind", ["overloaded", "draining", "internal", "transfer"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_refusal_before_the_first_token_is_retried_elsewhere(house: House, kind: str, role: str) -> None:
    for _ in range(2):
        await house.pair()
    await house.route()
    for worker in house.workers:
        if wire.Role.Name(worker.role) == f"ROLE_{role.upper()}":
            worker.script.refuse.append(fault(kind))
            break
    for _ in range(2):  # one of the two meets the refusal
        _, kept = fly(house)
        await landed(kept)
        assert complete(kept)


async def test_prefill_that_fails_for_good_leaves_the_work_to_decode(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.refuse_always = fault("internal")
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert modes(decode) == ["RESERVE", "LOCAL"]
    assert not house.cluster.reserved


async def test_invalid_is_the_answer_and_not_retried(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.refuse_always = fault("invalid", "no such thing", param="seed")
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert kept.error is not None
    assert (kept.error.kind, kept.error.param) == (ErrorKind.INVALID, "seed")
    assert len(prefill.submits) == 1
    await eventually(lambda: bool(decode.aborts), "decode was told")


async def test_all_overloaded_is_an_answer_at_once(house: House) -> None:
    prefill, _ = await house.pair()
    prefill.script.refuse_always = fault("overloaded", retry_after_ms=700)
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert isinstance(kept.error, Overloaded)
    assert kept.error.retry_after_ms == 700


async def test_a_request_that_fails_everywhere_ends_after_a_few_attempts(house: House) -> None:
    _, decode = await house.pair()
    decode.script.refuse_always = fault("internal", "boom")
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert kept.error is not None
    assert "boom" in kept.error.message
    assert len(decode.submits) == MAX_FAILURES


async def test_a_draining_worker_is_left_for_good(house: House) -> None:
    _, decode = await house.pair()
    decode.script.refuse_always = fault("draining")
    await house.route()
    _, kept = fly(house, worker_wait_s=0.2)
    await landed(kept)
    assert isinstance(kept.error, NoWorker)
    assert len(decode.submits) == 1


async def test_prefill_lost_before_its_token_goes_elsewhere(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.hold = True
    await house.route()
    _, kept = fly(house)
    await eventually(lambda: bool(prefill.submits), "prefill has it")
    await prefill.stop()
    await landed(kept)
    assert complete(kept)
    assert modes(decode) == ["RESERVE", "LOCAL"]
    assert decode.aborts


async def test_prefill_lost_after_its_token_is_noticed_when_decode_gets_nothing(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.hold_handoff = True
    await house.route()
    _, kept = fly(house)
    await eventually(lambda: bool(kept.ids), "token #1 is out")
    await prefill.stop()
    await landed(kept)
    assert complete(kept)
    resumed = decode.submits[-1]
    assert resumed.prompt_tokens == len(PROMPT)
    assert tokens_from_bytes(resumed.tokens) == [*PROMPT, *expected(PROMPT, 1)]


async def test_prefill_lost_after_the_handover_changes_nothing(house: House) -> None:
    prefill, decode = await house.pair(tick_s=0.01)
    await house.route()
    _, kept = fly(house)
    await eventually(lambda: len(kept.ids) > 3, "decode is at it")
    await prefill.stop()
    await landed(kept)
    assert complete(kept)
    assert len(decode.submits) == 1


async def test_decode_lost_in_the_middle_is_prefilled_again_from_what_was_sent(house: House) -> None:
    prefill, first = await house.pair(tick_s=0.005)
    second = await house.add(wire.ROLE_DECODE, tick_s=0.005)
    await house.route()
    first.script.die_after_tokens = second.script.die_after_tokens = 5
    _, kept = fly(house)
    await eventually(lambda: len(kept.ids) >= 6, "decode is at it")
    for worker in (first, second):
        worker.script.die_after_tokens = None
    await landed(kept)
    assert complete(kept)
    resumed = prefill.submits[-1]
    assert resumed.prompt_tokens == len(PROMPT)
    sent = len(tokens_from_bytes(resumed.tokens)) - len(PROMPT)
    assert sent >= 6
    assert tokens_from_bytes(resumed.tokens)[len(PROMPT) :] == expected(PROMPT, sent)


async def test_the_only_decode_worker_may_return_while_the_stream_waits(house: House) -> None:
    _, decode = await house.pair(tick_s=0.005)
    await house.route()
    _, kept = fly(house, resume_wait_s=8.0)
    await eventually(lambda: len(kept.ids) > 4, "decode is at it")
    await decode.stop()
    await decode.start()
    await landed(kept)
    assert complete(kept)


async def test_many_streams_survive_the_death_of_their_worker(house: House) -> None:
    await house.pair(tick_s=0.005)
    await house.pair(tick_s=0.005)
    await house.route()
    prompts = [[*PROMPT, number] for number in range(100, 116)]
    flown = [fly(house, prompt=prompt)[1] for prompt in prompts]
    await eventually(lambda: all(len(kept.ids) > 2 for kept in flown), "all are at it")
    await house.workers[1].stop()
    await house.workers[2].stop()
    for kept in flown:
        await landed(kept)
    assert [kept.ids for kept in flown] == [expected(prompt, 20) for prompt in prompts]


async def test_a_failure_reported_mid_stream_is_resumed(house: House) -> None:
    _, decode = await house.pair()
    decode.script.fail_after_tokens = (4, fault("internal"))
    await house.route()
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)


async def test_a_started_stream_sits_out_an_overload(house: House) -> None:
    _, decode = await house.pair()
    decode.script.fail_after_tokens = (4, fault("internal"))
    await house.route()
    _, kept = fly(house)
    await eventually(lambda: bool(decode.submits), "reserved")
    decode.script.refuse += [fault("overloaded")] * 2
    await landed(kept)
    assert complete(kept)


async def test_a_failed_transfer_blames_the_sender(house: House) -> None:
    prefill, decode = await house.pair()
    await house.route()
    decode.script.refuse.append(fault("transfer"))
    _, kept = fly(house)
    await landed(kept)
    assert complete(kept)
    assert modes(decode) == ["RESERVE", "LOCAL"]
    assert not prefill.submits


async def test_nobody_there_is_an_error_after_a_short_wait(house: House) -> None:
    await house.route(["127.0.0.1:1"])
    _, kept = fly(house, worker_wait_s=0.1)
    await landed(kept)
    assert isinstance(kept.error, NoWorker)
    assert "127.0.0.1:1" in kept.error.message


async def test_a_worker_that_appears_during_the_wait_takes_it(house: House) -> None:
    worker = FakeWorker(wire.ROLE_COLOCATED, house.cluster)
    house.workers.append(await worker.start())
    address = worker.address
    await worker.stop()
    await house.route([address])
    _, kept = fly(house, worker_wait_s=5.0)
    await worker.start()
    await landed(kept)
    assert complete(kept)


async def test_the_deadline_names_the_phase(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.hold = True
    await house.route()
    _, kept = fly(house, deadline_s=asyncio.get_running_loop().time() + 0.1)
    await landed(kept)
    assert isinstance(kept.error, DeadlineExceeded)
    assert "prefilling" in kept.error.message
    await eventually(lambda: bool(prefill.aborts and decode.aborts), "both were told")


async def test_an_abort_reaches_both_workers_and_the_sink_hears_nothing_more(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.hold_handoff = True
    await house.route()
    flight, kept = fly(house)
    await eventually(lambda: bool(kept.ids), "token #1 is out")
    flight.abort("enough")
    flight.abort("twice")
    await eventually(lambda: bool(prefill.aborts and decode.aborts), "both were told")
    assert [reason for _, _, reason in decode.aborts] == ["enough"]
    assert not kept.over.is_set()


async def test_a_silent_worker_is_left_when_there_is_another(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.script.silent = True
    await house.route()
    _, kept = fly(house)
    await eventually(lambda: bool(prefill.submits), "prefill has it")
    assert house.router is not None
    link = next(link for link in house.router.fleet.links if link.address == prefill.address)
    link._heard_at_s -= SUSPECT_S  # as if it had been silent for so long
    await landed(kept)
    assert complete(kept)
    assert modes(decode) == ["RESERVE", "LOCAL"]


async def test_a_silent_worker_without_an_alternative_is_waited_for(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    await house.route()
    worker.script.silent = True
    _, kept = fly(house)
    await eventually(lambda: bool(worker.submits), "it has the request")
    assert house.router is not None
    house.router.fleet.links[0]._heard_at_s -= SUSPECT_S
    await eventually(lambda: not house.router.fleet.links[0].up, "suspect")  # type: ignore[union-attr]
    worker.script.silent = False
    await landed(kept)
    assert complete(kept)
    assert len(worker.submits) == 1


async def test_prompts_go_where_their_pages_are(house: House) -> None:
    first = await house.add(wire.ROLE_COLOCATED)
    second = await house.add(wire.ROLE_COLOCATED)
    await house.route()
    pages = page_hashes(PageHash(second.hash_root), PROMPT, 16)
    second.send_kv(second.streams[0], stored=b"".join(pages))
    assert house.router is not None
    links = house.router.fleet.links
    await eventually(lambda: len(links[1].pages) == len(pages), "the events arrived")
    assert len(pages[0]) == HASH_BYTES
    for _ in range(4):
        _, kept = fly(house)
        await landed(kept)
    assert not first.submits
    assert len(second.submits) == 4
