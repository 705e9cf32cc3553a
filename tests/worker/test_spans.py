"""What a worker tells of a request when it is over: its phases, its transfers, and what counts as an error."""

from __future__ import annotations

import time

import pytest
from support.collector import Collector, SeenSpan

from baton_common.clock import ManualClock
from baton_common.errors import Aborted, BatonError, ErrorKind
from baton_common.ids import RequestId, TransferId
from baton_common.telemetry import open_tracing
from baton_engine.request import Mode, Phase, Request, SamplingParams
from baton_kvtransfer.records import Receipt
from baton_worker.outbox import KvMoved
from baton_worker.spans import RequestSpans

ROUTER = f"00-{'a' * 32}-{'b' * 16}-01"
ID = RequestId("chat-1/1.7")


def request(mode: Mode, *phases: Phase) -> Request:
    """Arrived at 100 s, one phase each 10 ms."""
    made = Request(
        request_id=ID, mode=mode, tokens=list(range(70)), prompt_tokens=64, sampling=SamplingParams(),
        deadline_s=200.0, arrival_s=100.0, cached_tokens=48, filled_tokens=32, preemptions=1,
    )  # fmt: skip
    made.stamps = {phase: 100.0 + 0.01 * number for number, phase in enumerate(phases)}
    return made


def moved(what: str, *, sent: bool) -> KvMoved:
    receipt = Receipt(
        transfer_id=TransferId("t-1"), peer="other", wire="shm", bytes=4096, chunks=3, resends=1,
        first_chunk_s=100.001, last_chunk_s=100.004, finish_s=100.005, commit_s=100.0075,
    )  # fmt: skip
    return KvMoved(request_id=ID, what=what, sent=sent, receipt=receipt)  # type: ignore[arg-type]


def told(made: Request, moves: list[KvMoved] | None = None, error: BatonError | None = None) -> list[SeenSpan]:
    """The spans, that of the request first. Nothing comes of a request that belongs to no trace."""
    with Collector() as collector:
        tracing = open_tracing(collector.endpoint, service="w", instance="w-1", clock=ManualClock(101.0))
        RequestSpans(tracing).tell(made, parent="", moves=moves or [], error=error)
        RequestSpans(tracing).tell(made, parent=ROUTER, moves=moves or [], error=error)
        tracing.close(20.0)
        spans = collector.wait(lambda seen: len(seen) > len(moves or []), "all spans")
        assert len(spans) == 1 + len(moves or [])
    return sorted(spans, key=lambda span: span.parent_id != "b" * 16)


def test_the_parts_of_a_handoff_are_children_of_the_requests_span() -> None:
    made = request(Mode.PREFILL, Phase.QUEUED, Phase.PREFILLING, Phase.SENDING, Phase.HANDED_OFF, Phase.FREED)
    span, pull, handoff = told(made, [moved("pull", sent=False), moved("handoff", sent=True)])
    assert (span.name, span.kind, span.trace_id, span.error) == ("prefill", "server", "a" * 32, None)
    assert span.attributes == {
        "baton.request_id": ID, "baton.prompt_tokens": 64, "baton.output_tokens": 6, "baton.cached_tokens": 48,
        "baton.filled_tokens": 32, "baton.preemptions": 1,
    }  # fmt: skip
    since = [(name, at_ns - span.begin_ns) for name, at_ns, _ in span.events]
    assert since == [
        ("queued", 0), ("prefilling", 10_000_000), ("sending", 20_000_000), ("handed_off", 30_000_000),
        ("freed", 40_000_000),
    ]  # fmt: skip
    assert span.end_ns - span.begin_ns == 40_000_000
    assert abs(time.time_ns() - span.end_ns) < 60e9
    assert [(part.name, part.kind, part.parent_id) for part in (pull, handoff)] == [
        ("pull", "consumer", span.span_id), ("handoff", "producer", span.span_id),
    ]  # fmt: skip
    assert handoff.attributes == {
        "baton.kv.transfer_id": "t-1", "baton.kv.peer": "other", "baton.kv.wire": "shm", "baton.kv.bytes": 4096,
        "baton.kv.chunks": 3, "baton.kv.resends": 1, "baton.kv.exposed_ms": pytest.approx(2.5),
    }  # fmt: skip
    assert (handoff.begin_ns - span.begin_ns, handoff.end_ns - span.begin_ns) == (1_000_000, 7_500_000)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (None, None),
        (Aborted("the client left"), None),
        (BatonError("the KV is damaged", kind=ErrorKind.TRANSFER), "the KV is damaged"),
    ],
)
def test_an_abort_is_a_wish_and_anything_else_an_error(error: BatonError | None, shown: str | None) -> None:
    [span] = told(request(Mode.RESERVE, Phase.QUEUED, Phase.RESERVED, Phase.ABORTING, Phase.FREED), error=error)
    assert (span.name, span.error) == ("decode", shown)
    assert span.attributes.get("baton.ended") == (error.kind.value if error else None)
    assert span.attributes.get("baton.ended_because") == (error.message if error else None)


def test_a_request_that_was_refused_at_once_has_a_span_too() -> None:
    [span] = told(request(Mode.LOCAL), error=BatonError("too long", kind=ErrorKind.INVALID))
    assert (span.name, span.error, span.events) == ("local", "too long", [])
