"""The roles over real gRPC with a scripted engine; the endpoint is a fake, so the test plays the other worker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.router_client import Answer, RouterClient
from support.scripted_engine import PAGE_TOKENS, expected_token
from worker.conftest import COMPAT, Bench, Worker

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import TransferId
from baton_engine.request import Mode, SamplingParams
from baton_kvtransfer.errors import Aborted, PeerGone
from baton_kvtransfer.records import FirstToken, Receipt
from baton_proto import common_pb2, worker_pb2

PROMPT = list(range(2 * PAGE_TOKENS + 3))
SAMPLING = SamplingParams(temperature=0.0, max_tokens=6)


def outputs(prompt: list[int], count: int) -> list[int]:
    return [expected_token(prompt, position) for position in range(count)]


def receipt(transfer_id: str) -> Receipt:
    return Receipt(
        transfer_id=TransferId(transfer_id), peer="w", wire="inproc", bytes=1, chunks=1, resends=0,
        first_chunk_s=0.0, last_chunk_s=0.0, finish_s=0.0, commit_s=0.0,
    )  # fmt: skip


async def refused(answer: Answer) -> BatonError:
    with pytest.raises(BatonError) as error:
        await answer.end()
    return error.value


# ---- decode ---------------------------------------------------------------------------------------------------------
async def test_a_reservation_is_expected_before_its_ticket_arrives(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        ticket = await answer.ticket
        assert (ticket.incarnation, ticket.peer_address, ticket.local) == ("inc", "127.0.0.1:7", False)
        assert ticket.compat == COMPAT
        inbound = bench.endpoint.expected[TransferId(ticket.transfer_id)]
        assert (inbound.first_token, inbound.end_token) == (ticket.first_missing_token, len(PROMPT))
        assert len(inbound.pages) == 3


async def test_transfer_ids_are_never_used_twice(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as one, bench.router() as two:
        tickets = [await (await r.submit(Mode.RESERVE, PROMPT)).ticket for r in (one, two, one, two)]
        assert len({ticket.transfer_id for ticket in tickets}) == 4
        assert all(ticket.transfer_id.startswith("inc-") for ticket in tickets)


async def test_decode_goes_on_at_token_two_when_the_kv_is_there(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        transfer_id = TransferId((await answer.ticket).transfer_id)
        bench.role.inbound.on_receiving(transfer_id)
        first = FirstToken(token_id=expected_token(PROMPT, 0), position=0)
        bench.role.inbound.on_received(transfer_id, first, receipt(transfer_id))
        assert await answer.end() == outputs(PROMPT, 6)[1:]
        assert answer.tokens[0].position == 1
        assert bench.role.handoffs() == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerGone("the sender is gone"), ErrorKind.TRANSFER),
        (Aborted("peer p aborted: its router left"), ErrorKind.TRANSFER),
        (Aborted("peer p aborted: draining", kind=ErrorKind.DRAINING), ErrorKind.DRAINING),
    ],
)
async def test_kv_that_does_not_come_fails_the_request_so_that_a_router_retries(
    worker: Worker, error: BatonError, kind: ErrorKind
) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        transfer_id = TransferId((await answer.ticket).transfer_id)
        bench.role.inbound.on_failed(transfer_id, error)
        end = await refused(answer)
        assert end.kind is kind
        assert end.kind.retriable


async def test_pages_of_an_aborted_reservation_wait_for_the_fence(worker: Worker) -> None:
    bench = await worker()
    bench.endpoint.fence.passed = False
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        transfer_id = TransferId((await answer.ticket).transfer_id)
        await router.abort(answer)
        await router.wait(lambda: transfer_id in bench.endpoint.cancelled)
        assert bench.engine.stats().leased_pages == 1
        assert not answer.over.done()
        bench.endpoint.fence.passed = True
        assert (await refused(answer)).kind is ErrorKind.ABORTED
        assert bench.engine.stats().leased_pages == 0


async def test_an_event_after_the_release_reaches_nobody(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        transfer_id = TransferId((await answer.ticket).transfer_id)
        await router.abort(answer)
        await refused(answer)
        bench.role.inbound.on_received(transfer_id, FirstToken(token_id=1, position=0), receipt(transfer_id))
        assert await (await router.submit(Mode.LOCAL, [1])).end() == outputs([1], 8)
        assert router.late == []


async def test_little_uncached_work_is_started_at_once(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING, local_below_tokens=1000)
        assert (await answer.ticket).local
        assert await answer.end() == outputs(PROMPT, 6)
        assert bench.endpoint.expected == {}


async def test_without_peers_every_reservation_is_local(worker: Worker) -> None:
    bench = await worker(peers=False)
    async with bench.router() as router:
        answer = await router.submit(Mode.RESERVE, PROMPT, sampling=SAMPLING)
        assert (await answer.ticket).local
        assert await answer.end() == outputs(PROMPT, 6)


async def test_a_worker_without_peers_hands_nothing_over(worker: Worker) -> None:
    bench = await worker(peers=False)
    async with bench.router() as router:
        end = await refused(await router.submit(Mode.PREFILL, PROMPT))
        assert (end.kind, end.param) == (ErrorKind.INVALID, "mode")


# ---- prefill --------------------------------------------------------------------------------------------------------
def ticket_for(change: Callable[[common_pb2.Compat], None] = lambda compat: None, first: int = 0) -> worker_pb2.Ticket:
    ticket = worker_pb2.Ticket(
        transfer_id="d-1", peer_address="127.0.0.1:8", incarnation="d", first_missing_token=first, compat=COMPAT
    )
    change(ticket.compat)
    return ticket


async def prefill(bench: Bench, router: RouterClient, *, first: int = 0) -> Answer:
    answer = await router.submit(Mode.PREFILL, PROMPT, sampling=SAMPLING, ticket=ticket_for(first=first))
    await answer.first()
    await router.wait(lambda: bench.endpoint.opened[0].finished is not None)
    return answer


async def test_prefill_announces_every_layer_and_finishes_with_token_one(worker: Worker) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        answer = await prefill(bench, router, first=PAGE_TOKENS)
        transfer = bench.endpoint.opened[0]
        assert transfer.outbound.peer_incarnation == "d"
        assert (transfer.outbound.first_token, transfer.outbound.end_token) == (PAGE_TOKENS, len(PROMPT))
        assert transfer.ready_calls == [(0, 2, 0, len(PROMPT)), (2, 4, 0, len(PROMPT))]
        assert transfer.finished == FirstToken(token_id=expected_token(PROMPT, 0), position=0)
        assert answer.token_ids == outputs(PROMPT, 1)
        assert not answer.over.done()


async def test_a_committed_handoff_ends_without_a_further_word(worker: Worker) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        answer = await prefill(bench, router)
        bench.endpoint.opened[0].outbound.done(receipt("d-1"))
        await router.wait(lambda: bench.desk.open_requests == 0)
        assert not answer.over.done()
        assert bench.role.handoffs() == 1
        assert bench.endpoint.opened[0].aborted is not None  # the fence is asked for, also after the end


@pytest.mark.parametrize("error", [PeerGone("gone"), Aborted("peer d aborted: its router left")])
async def test_a_handoff_that_fails_after_token_one_is_told(worker: Worker, error: BatonError) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        answer = await prefill(bench, router)
        bench.endpoint.opened[0].outbound.done(error)
        assert (await refused(answer)).kind is ErrorKind.TRANSFER
        assert answer.token_ids == outputs(PROMPT, 1)


@pytest.mark.parametrize(
    ("field", "value"), [("kv_heads", 3), ("layers", 5), ("model_digest", "other"), ("rope", "other")]
)
async def test_an_incompatible_ticket_is_refused_before_anything_is_computed(
    worker: Worker, field: str, value: object
) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        ticket = ticket_for(lambda compat: setattr(compat, field, value))
        end = await refused(await router.submit(Mode.PREFILL, PROMPT, ticket=ticket))
        assert (end.kind, end.param) == (ErrorKind.INCOMPATIBLE, field)
        assert str(value) in str(end)
        assert bench.engine.steps == 0


@pytest.mark.parametrize("first", [5, 3 * PAGE_TOKENS])
async def test_a_ticket_that_does_not_fit_the_prompt_is_refused(worker: Worker, first: int) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        end = await refused(await router.submit(Mode.PREFILL, PROMPT, ticket=ticket_for(first=first)))
        assert (end.kind, end.param) == (ErrorKind.INVALID, "ticket")


@pytest.mark.parametrize(("mode", "param"), [(Mode.LOCAL, "mode"), (Mode.RESERVE, "mode"), (Mode.PREFILL, "ticket")])
async def test_a_prefill_worker_takes_only_prefills_with_a_ticket(worker: Worker, mode: Mode, param: str) -> None:
    bench = await worker(kind="prefill")
    async with bench.router() as router:
        assert (await refused(await router.submit(mode, PROMPT))).param == param
