"""What the router says of a request in its span: where it went, what became of it, and whose trace it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import httpx
import pytest
from router.conftest import HELLO, MODEL, House
from router.fake_worker import fault
from support.collector import Collector, SeenSpan

from baton_common import otlp
from baton_proto import worker_pb2 as wire

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 4}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr(otlp, "BATCH_EVERY_MS", 20)
    with Collector() as made:
        yield made


async def seen(collector: Collector, count: int) -> list[SeenSpan]:
    enough: Callable[[list[SeenSpan]], bool] = lambda spans: len(spans) >= count  # noqa: E731
    return await asyncio.to_thread(collector.wait, enough, f"{count} spans")


def events(span: SeenSpan) -> list[str]:
    return [name for name, _, _ in span.events]


async def test_a_request_is_one_span_of_the_clients_trace_and_the_workers_hear_its_name(
    house: House, http: httpx.AsyncClient, collector: Collector
) -> None:
    prefill, decode = await house.pair()
    url = await house.serve(otlp_endpoint=collector.endpoint)
    answer = await http.post(f"{url}/v1/chat/completions", json=BODY, headers=CLIENT)
    [span] = await seen(collector, 1)
    assert (span.service, span.name, span.kind, span.error) == ("baton-router", f"chat {MODEL}", "server", None)
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    for worker in (prefill, decode):
        [submit] = worker.submits
        assert submit.traceparent.startswith(f"00-{TRACE}-{span.span_id}-")
    facts = span.attributes
    assert facts["http.response.status_code"] == 200
    assert facts["http.route"] == "/v1/chat/completions"
    assert facts["gen_ai.request.model"] == MODEL
    assert facts["gen_ai.response.id"] == answer.json()["id"]
    assert facts["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert facts["gen_ai.usage.output_tokens"] == 4
    assert facts["baton.placement"] == "handoff"
    assert facts["baton.decode_worker"] == f"{decode.worker_id}/{decode.incarnation}"
    assert facts["baton.prefill_worker"] == f"{prefill.worker_id}/{prefill.incarnation}"
    assert events(span) == ["placed", "first_token"]
    times = [span.begin_ns, *(at_ns for _, at_ns, _ in span.events), span.end_ns]
    assert times == sorted(times)


async def test_every_attempt_shows_with_why_it_failed(
    house: House, http: httpx.AsyncClient, collector: Collector
) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    worker.script.refuse.append(fault("transfer", "the wire broke"))
    url = await house.serve(otlp_endpoint=collector.endpoint)
    answer = await http.post(f"{url}/v1/chat/completions", json={**BODY, "stream": True})
    assert answer.status_code == 200
    [span] = await seen(collector, 1)
    assert events(span) == ["placed", "retry", "placed", "first_token"]
    assert span.events[1][2]["baton.error"] == "the wire broke"
    assert (span.attributes["baton.placement"], span.attributes["baton.stream"]) == ("local", True)
    assert span.error is None
    assert span.parent_id == ""


async def test_refusals_are_spans_but_only_our_own_failures_are_errors(
    house: House, http: httpx.AsyncClient, collector: Collector
) -> None:
    url = await house.serve(addresses=[], worker_wait_s=0.0, otlp_endpoint=collector.endpoint)
    assert (await http.post(f"{url}/v1/chat/completions", json={**BODY, "n": 0})).status_code == 400
    assert (await http.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x"})).status_code == 503
    spans = {span.name: span for span in await seen(collector, 2)}
    bad, nobody = spans[f"chat {MODEL}"], spans[f"text_completion {MODEL}"]
    assert (bad.attributes["http.response.status_code"], bad.error) == (400, None)
    assert nobody.attributes["http.response.status_code"] == 503
    assert nobody.error is not None
    assert "no worker" in nobody.error


async def test_what_a_worker_refuses_for_good_is_the_clients_mistake(
    house: House, http: httpx.AsyncClient, collector: Collector
) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    worker.script.refuse.append(fault("invalid", "logit_bias is too long", param="logit_bias"))
    url = await house.serve(otlp_endpoint=collector.endpoint)
    assert (await http.post(f"{url}/v1/chat/completions", json=BODY)).status_code == 400
    [span] = await seen(collector, 1)
    assert (span.attributes["http.response.status_code"], span.error) == (400, None)


async def test_who_has_no_key_leaves_no_span(house: House, http: httpx.AsyncClient, collector: Collector) -> None:
    await house.pair()
    url = await house.serve(api_keys=("secret",), otlp_endpoint=collector.endpoint)
    assert (await http.post(f"{url}/v1/chat/completions", json=BODY, headers=CLIENT)).status_code == 401
    key = {"authorization": "Bearer secret"}
    assert (await http.post(f"{url}/v1/chat/completions", json=BODY, headers=key)).status_code == 200
    assert [span.attributes["http.response.status_code"] for span in await seen(collector, 1)] == [200]


async def test_without_tracing_the_clients_trace_reaches_the_workers(house: House, http: httpx.AsyncClient) -> None:
    prefill, decode = await house.pair()
    url = await house.serve()
    assert (await http.post(f"{url}/v1/chat/completions", json=BODY, headers=CLIENT)).status_code == 200
    assert {submit.traceparent for submit in prefill.submits + decode.submits} == {CLIENT["traceparent"]}
