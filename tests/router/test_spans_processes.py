"""One trace over real processes: the client's request, the router, both workers, and the KV between them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.checkpoints import tiny_checkpoint
from support.collector import Collector, SeenSpan
from support.processes import Service, spawn_service

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOKENS = 12
PROMPT = [(7 * index) % 290 + 10 for index in range(150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Service]:
    router = {"local_below_tokens": 0, "served_name": "tiny", "otlp_endpoint": collector.endpoint, "drain_s": 1}
    folder = tmp_path_factory.mktemp("service")
    with spawn_service(folder, checkpoint, router_settings=router, otlp_endpoint=collector.endpoint) as made:
        yield made


def ask(service: Service, trace: str, prompt: list[int], **body: Any) -> dict[str, Any]:
    assert service.router is not None
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **body}
    headers = {"traceparent": f"00-{trace}-{'1' * 16}-01"}
    answer = httpx.post(f"{service.router.url}/v1/completions", json=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def of_trace(spans: list[SeenSpan], trace: str) -> list[SeenSpan]:
    return [span for span in spans if span.trace_id == trace]


def trace_of(collector: Collector, trace: str, count: int) -> dict[tuple[str, str], SeenSpan]:
    """(service, name) -> span, once so many of this trace came."""
    found = of_trace(collector.wait(lambda spans: len(of_trace(spans, trace)) >= count, f"{count} spans"), trace)
    assert len(found) == count, [(span.service, span.name) for span in found]
    return {(span.service, span.name): span for span in found}


def phases(span: SeenSpan) -> list[str]:
    return [name for name, _, _ in span.events]


def test_one_trace_from_the_client_to_both_workers_and_the_kv_between_them(
    service: Service, collector: Collector
) -> None:
    trace = "a" * 32
    ask(service, trace, PROMPT)
    spans = trace_of(collector, trace, 5)
    root = spans["baton-router", "text_completion tiny"]
    decode, prefill = spans["baton-decode", "decode"], spans["baton-prefill", "prefill"]
    sent, received = spans["baton-prefill", "handoff"], spans["baton-decode", "handoff"]
    assert root.parent_id == "1" * 16
    assert decode.parent_id == prefill.parent_id == root.span_id
    assert (sent.parent_id, received.parent_id) == (prefill.span_id, decode.span_id)
    assert [span.kind for span in (root, decode, prefill, sent, received)] == [
        "server", "server", "server", "producer", "consumer",
    ]  # fmt: skip
    assert [span.error for span in spans.values()] == [None] * 5
    assert root.attributes["baton.decode_worker"].startswith(f"{decode.instance}/")
    assert root.attributes["baton.prefill_worker"].startswith(f"{prefill.instance}/")
    request = root.attributes["gen_ai.response.id"]
    for leg in (decode, prefill):
        assert leg.attributes["baton.request_id"].startswith(request)
        assert leg.attributes["baton.prompt_tokens"] == len(PROMPT)
        assert leg.attributes["baton.preemptions"] == leg.attributes["baton.cached_tokens"] == 0
    assert decode.attributes["baton.output_tokens"] == TOKENS

    begins = [root.begin_ns, decode.begin_ns, prefill.begin_ns, sent.begin_ns]
    assert begins == sorted(begins)
    assert received.begin_ns > decode.begin_ns
    for span in spans.values():
        assert span.begin_ns <= span.end_ns
        times = [at_ns for _, at_ns, _ in span.events]
        assert times == sorted(times)
        assert not times or span.begin_ns <= times[0] <= times[-1] <= span.end_ns
    assert sent.end_ns <= prefill.end_ns
    assert received.end_ns <= decode.end_ns
    assert phases(decode) == [
        "queued", "reserved", "receiving", "ready", "running", "finished", "fencing", "freed",
    ]  # fmt: skip
    assert phases(prefill) == ["queued", "prefilling", "sending", "handed_off", "fencing", "freed"]


def test_the_transfer_is_told_alike_by_both_ends(service: Service, collector: Collector) -> None:
    trace = "b" * 32
    ask(service, trace, [token + 1 for token in PROMPT])
    spans = trace_of(collector, trace, 5)
    sent, received = spans["baton-prefill", "handoff"].attributes, spans["baton-decode", "handoff"].attributes
    for name in ("transfer_id", "wire", "bytes", "chunks"):
        assert sent[f"baton.kv.{name}"] == received[f"baton.kv.{name}"]
    assert sent["baton.kv.bytes"] > 0
    assert sent["baton.kv.chunks"] > 0
    assert (sent["baton.kv.peer"], received["baton.kv.peer"]) == (
        spans["baton-decode", "decode"].instance,
        spans["baton-prefill", "prefill"].instance,
    )
    assert sent["baton.kv.exposed_ms"] >= 0


def test_what_was_found_in_the_cache_is_in_the_trace(service: Service, collector: Collector) -> None:
    prompt = [token + 2 for token in PROMPT]
    ask(service, "c" * 32, prompt)
    ask(service, "d" * 32, prompt)
    trace_of(collector, "c" * 32, 5)
    spans = trace_of(collector, "d" * 32, 5)
    assert spans["baton-decode", "decode"].attributes["baton.cached_tokens"] > 0
    assert spans["baton-router", "text_completion tiny"].attributes["baton.cached_tokens"] > 0


def test_the_last_spans_are_sent_before_the_processes_end(service: Service, collector: Collector) -> None:
    """Keep it the last of the module: it ends the service."""
    trace = "e" * 32
    ask(service, trace, [token + 3 for token in PROMPT])
    assert service.router is not None
    processes = [service.router, *service.prefill, *service.decode]
    for process in processes:
        process.terminate()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(of_trace(collector.spans, trace)) == 5


def test_nobody_is_hurt_by_a_collector_that_is_away(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # ours, and not listening
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        router = {"served_name": "tiny", "otlp_endpoint": endpoint, "drain_s": 1}
        settings = {"prefill": 0, "decode": 0, "colocated": 1, "router_settings": router, "otlp_endpoint": endpoint}
        with spawn_service(tmp_path, checkpoint, **settings) as service:
            for number in range(3):
                answer = ask(service, "f" * 32, PROMPT[number:])
                assert answer["usage"]["completion_tokens"] == TOKENS
            assert service.router is not None
            processes = [service.router, *service.colocated]
            for process in processes:
                process.terminate()
            assert [process.wait(60) for process in processes] == [0, 0]
            assert "Traceback" not in "".join(process.log() for process in processes)
