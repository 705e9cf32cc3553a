"""Both ends of a pull inside the workers: what is asked for, what is answered, and what a stranger cannot get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from worker.conftest import COMPAT, FakeEndpoint, FakeFence, FakeTransfer

from baton_common.clock import ManualClock
from baton_common.errors import Aborted, BatonError, ErrorKind
from baton_common.hashing import chain_root, page_hashes, salted_root
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_engine.request import Mode, Request, SamplingParams
from baton_kvtransfer.records import Outbound, PullOrder, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Filling
from baton_worker.lending import Lender
from baton_worker.outbox import Event, KvMoved
from baton_worker.pulling import LEAST_TOKENS, PULL_S, PullSource

PAGE = COMPAT.page_tokens
HERE = 10 * PAGE
"""Tokens whose KV decode has."""
TICKET = TransferId("d-1")
ROOT = chain_root(COMPAT.model_digest)


def request(name: str = "r", *, salt: str = "", mode: Mode = Mode.RESERVE) -> Request:
    rng = Random(1)
    tokens = [rng.randrange(300) for _ in range(HERE + 37)]
    return Request(
        request_id=RequestId(name), mode=mode, tokens=tokens, prompt_tokens=len(tokens), sampling=SamplingParams(),
        deadline_s=100.0, arrival_s=0.0, cache_salt=salt, transfer_id=TICKET,
    )  # fmt: skip


PAGES = tuple(PageId(page) for page in range(50, 50 + -(-len(request().tokens) // PAGE)))


class Outlet:
    """An outbox that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event, *, wake: bool = True) -> None:
        self.events.append(event)


def receipt(transfer_id: str) -> Receipt:
    return Receipt(
        transfer_id=TransferId(transfer_id), peer="other", wire="tcp", bytes=1, chunks=1, resends=0, first_chunk_s=0.0,
        last_chunk_s=0.0, finish_s=0.0, commit_s=0.0,
    )  # fmt: skip


# ---- decode: lending ------------------------------------------------------------------------------------------------
@dataclass
class Lending:
    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)
    outlet: Outlet = field(default_factory=Outlet)
    refused: list[BatonError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lender = Lender(endpoint=self.endpoint, compat=COMPAT, outbox=self.outlet)  # type: ignore[arg-type]

    def order(self, *, salt: str = "", page_tokens: int = PAGE, end: int = HERE) -> PullOrder:
        """What an honest peer asks."""
        tokens = request().tokens[:end]
        return PullOrder(
            transfer_id=TransferId("pull-1"), ticket=TICKET, first_token=2 * page_tokens, end_token=end,
            page_hash=page_hashes(salted_root(ROOT, salt), tokens, page_tokens)[-1], page_tokens=page_tokens, peer="p",
            peer_address="tcp://127.0.0.1:9", peer_incarnation="p-1", refuse=self.refused.append,
        )  # fmt: skip


def test_a_pull_is_answered_out_of_the_pages_of_the_reservation() -> None:
    lending = Lending()
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    lending.lender.on_pull(lending.order())
    (transfer,) = lending.endpoint.opened
    order = transfer.outbound
    assert (order.transfer_id, order.peer_address, order.peer_incarnation) == ("pull-1", "tcp://127.0.0.1:9", "p-1")
    assert (order.pages, order.first_token, order.end_token) == (PAGES, 2 * PAGE, HERE)
    assert transfer.ready_calls == [(0, COMPAT.layers, 2 * PAGE, HERE)]
    assert transfer.finishes == 1
    assert transfer.finished is None
    assert not lending.refused
    order.done(receipt("pull-1"))
    assert lending.outlet.events == [
        KvMoved(request_id=RequestId("r"), what="pull", sent=True, receipt=receipt("pull-1"))
    ]


@pytest.mark.parametrize("page_tokens", [4, 8, 2 * PAGE, 5 * PAGE])
def test_the_peer_may_have_another_page_size(page_tokens: int) -> None:
    lending = Lending()
    lending.lender.offer(TICKET, request(salt="s"), PAGES, HERE)
    lending.lender.on_pull(lending.order(salt="s", page_tokens=page_tokens))
    assert len(lending.endpoint.opened) == 1


BAD: dict[str, tuple[Callable[[PullOrder], PullOrder], ErrorKind]] = {
    "unknown ticket": (lambda order: replace(order, ticket=TransferId("d-2")), ErrorKind.ABORTED),
    "more than is here": (lambda order: replace(order, end_token=HERE + PAGE), ErrorKind.INVALID),
    "more than the prompt": (lambda order: replace(order, end_token=10**6 * PAGE), ErrorKind.INVALID),
    "other tokens": (lambda order: replace(order, page_hash=PageHash(b"x" * 16)), ErrorKind.INVALID),
    "hash of an earlier page": (lambda order: replace(order, end_token=HERE - PAGE), ErrorKind.INVALID),
    "other page size": (lambda order: replace(order, page_tokens=2 * PAGE), ErrorKind.INVALID),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_stranger_asks_is_refused_and_nothing_is_sent(what: str) -> None:
    change, kind = BAD[what]
    lending = Lending()
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    lending.lender.on_pull(change(lending.order()))
    assert [error.kind for error in lending.refused] == [kind]
    assert not lending.endpoint.opened


def test_another_salt_is_other_tokens() -> None:
    lending = Lending()
    lending.lender.offer(TICKET, request(salt="mine"), PAGES, HERE)
    lending.lender.on_pull(lending.order(salt="yours"))
    assert not lending.endpoint.opened
    assert len(lending.refused) == 1


def test_a_ticket_is_good_for_one_pull_said_once_or_twice() -> None:
    lending = Lending()
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    for _ in range(3):
        lending.lender.on_pull(lending.order())
    assert len(lending.endpoint.opened) == 1
    assert not lending.refused
    for number in range(100):
        lending.lender.on_pull(replace(lending.order(), transfer_id=TransferId(f"more-{number}")))
    assert len(lending.endpoint.opened) == 1
    assert len(lending.refused) == 100


def test_the_end_of_the_reservation_ends_the_pull_and_its_fence_holds_the_pages() -> None:
    lending = Lending(endpoint=FakeEndpoint(fence=FakeFence(passed=False)))
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    lending.lender.on_pull(lending.order())
    fence = lending.lender.withdraw(TICKET, Aborted("over"))
    assert lending.endpoint.opened[0].aborted is not None
    assert not fence.done()
    lending.endpoint.fence.passed = True
    assert fence.done()
    assert lending.lender.withdraw(TICKET, Aborted("twice")).done()
    lending.lender.on_pull(replace(lending.order(), transfer_id=TransferId("late")))
    assert [error.kind for error in lending.refused] == [ErrorKind.ABORTED]


def test_a_transfer_that_fails_is_told_to_who_waits_for_it() -> None:
    lending = Lending()
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    lending.lender.on_pull(lending.order())
    lending.endpoint.opened[0].outbound.done(BatonError("cannot connect"))
    assert [str(error) for error in lending.refused] == ["cannot connect"]
    assert not lending.outlet.events


def test_an_endpoint_that_closes_refuses() -> None:
    class Closed(FakeEndpoint):
        def open(self, outbound: Outbound) -> FakeTransfer:
            raise Aborted("this endpoint is closed")

    lending = Lending(endpoint=Closed())
    lending.lender.offer(TICKET, request(), PAGES, HERE)
    lending.lender.on_pull(lending.order())
    assert len(lending.refused) == 1
    assert lending.lender.withdraw(TICKET, Aborted("over")).done()


# ---- prefill: asking ------------------------------------------------------------------------------------------------
@dataclass
class Asking:
    missing: int = HERE
    kv_dtype: str = COMPAT.kv_dtype
    page: int = PAGE
    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)
    outlet: Outlet = field(default_factory=Outlet)
    reached: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        theirs = common_pb2.Compat()
        theirs.CopyFrom(COMPAT)
        theirs.kv_dtype = self.kv_dtype
        self.ticket = worker_pb2.Ticket(
            transfer_id=TICKET, peer_address="tcp://127.0.0.1:8", incarnation="d", first_missing_token=self.missing,
            compat=theirs,
        )  # fmt: skip
        self.source = PullSource(
            endpoint=self.endpoint, compat=COMPAT, clock=ManualClock(5.0), outbox=self.outlet,  # type: ignore[arg-type]
            ticket=lambda request_id: self.ticket if request_id == "r" else None,
        )  # fmt: skip
        self.request = request(mode=Mode.PREFILL)
        hashes = page_hashes(ROOT, self.request.tokens[:-1], self.page)
        self.filling = Filling(request=self.request, pages=PAGES, hashes=hashes, page_tokens=self.page)

    def fill(self, first: int = PAGE) -> None:
        self.source.fill(self.filling, first, self.reached.append)


def test_what_decode_has_and_prefill_has_not_is_expected_and_asked_for() -> None:
    asking = Asking()
    assert asking.source.wants(asking.request)
    asking.fill(first=3 * PAGE)
    ((transfer_id, inbound),) = asking.endpoint.expected.items()
    (pull,) = asking.endpoint.pulls
    assert (pull.transfer_id, pull.ticket, pull.peer_incarnation) == (transfer_id, TICKET, "d")
    for order in (inbound, pull):
        assert (order.first_token, order.end_token) == (3 * PAGE, HERE)
    assert pull.page_hash == asking.filling.hashes[HERE // PAGE - 1]
    assert inbound.deadline_s == 5.0 + PULL_S
    assert not asking.reached
    asking.source.received(transfer_id, receipt(transfer_id))
    asking.source.received(transfer_id, receipt(transfer_id))
    assert asking.reached == [HERE]
    assert [type(event) for event in asking.outlet.events] == [KvMoved]
    assert asking.source.stop(RequestId("r")).done()


def test_positions_are_rounded_to_the_own_page_border() -> None:
    """Decode's pages are smaller: its border is none here."""
    asking = Asking(missing=HERE - PAGE, page=4 * PAGE)
    asking.fill(first=0)
    (pull,) = asking.endpoint.pulls
    assert (pull.first_token, pull.end_token) == (0, 8 * PAGE)
    assert pull.page_hash == page_hashes(ROOT, asking.request.tokens, 4 * PAGE)[1]


def test_filling_never_goes_beyond_what_may_be_filled() -> None:
    asking = Asking(missing=len(request().tokens))
    asking.fill(first=0)
    (pull,) = asking.endpoint.pulls
    assert pull.end_token == asking.filling.end_token


@pytest.mark.parametrize("first", [HERE, HERE + PAGE, HERE - LEAST_TOKENS + PAGE])
def test_little_or_nothing_is_not_asked_for(first: int) -> None:
    asking = Asking()
    asking.fill(first=first)
    assert asking.reached == [first]
    assert not asking.endpoint.expected


def test_who_has_no_ticket_or_other_precision_is_not_wanted() -> None:
    assert not Asking().source.wants(request("local", mode=Mode.LOCAL))
    assert not Asking(kv_dtype="bfloat16").source.wants(request(mode=Mode.PREFILL))
    assert not Asking(missing=LEAST_TOKENS - PAGE).source.wants(request(mode=Mode.PREFILL))


def test_a_failure_means_that_it_is_computed() -> None:
    asking = Asking()
    asking.fill(first=2 * PAGE)
    (transfer_id,) = asking.endpoint.expected
    asking.source.failed(transfer_id, BatonError("late"))
    asking.source.failed(transfer_id, BatonError("twice"))
    assert asking.reached == [2 * PAGE]


def test_after_stop_nothing_is_said_and_the_fence_is_that_of_the_transfer() -> None:
    asking = Asking(endpoint=FakeEndpoint(fence=FakeFence(passed=False)))
    asking.fill()
    (transfer_id,) = asking.endpoint.expected
    fence = asking.source.stop(RequestId("r"))
    assert transfer_id in asking.endpoint.cancelled
    assert not fence.done()
    asking.source.received(transfer_id, receipt(transfer_id))
    assert not asking.reached
    assert asking.source.stop(RequestId("r")).done()


def test_an_endpoint_that_closes_means_that_it_is_computed() -> None:
    class Closed(FakeEndpoint):
        def pull(self, pull: object) -> None:
            raise Aborted("this endpoint is closed")

    asking = Asking(endpoint=Closed())
    asking.fill()
    assert asking.reached == [PAGE]
    assert list(asking.endpoint.cancelled) == list(asking.endpoint.expected)


def test_a_request_that_is_filled_again_asks_under_another_name() -> None:
    asking = Asking()
    asking.fill()
    asking.source.stop(RequestId("r"))
    asking.fill()
    assert len({pull.transfer_id for pull in asking.endpoint.pulls}) == 2
