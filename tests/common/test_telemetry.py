"""Spans: nothing at all without a collector, whole traces with one, and no harm from one that is away."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.collector import Collector

from baton_common import otlp
from baton_common.clock import ManualClock, SystemClock
from baton_common.errors import ConfigError
from baton_common.telemetry import OFF, Kind, Tracing, open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = f"00-{TRACE}-{PARENT}-01"


def tracing_to(endpoint: str) -> Tracing:
    return open_tracing(endpoint, service="baton-test", instance="one", clock=SystemClock())


def test_without_an_endpoint_there_is_no_thread_and_the_clients_trace_goes_on() -> None:
    threads = threading.active_count()
    tracing = tracing_to("")
    assert tracing is OFF
    span = tracing.span("chat", parent=CLIENT)
    span.set({"a": 1})
    span.event("b")
    span.end(error="c")
    assert span.traceparent == CLIENT
    assert tracing.span("chat", parent="").traceparent == ""
    tracing.close(1.0)
    assert threading.active_count() == threads


def test_opentelemetry_is_loaded_only_when_wanted() -> None:
    code = "import sys, baton_common.telemetry as t; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://", "http://a/?x=1", "4318"])
def test_what_is_no_address_is_refused_with_the_remedy(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="http://host:4318") as raised:
        tracing_to(endpoint)
    assert raised.value.param == "otlp_endpoint"


def test_spans_arrive_with_their_parents_times_and_facts() -> None:
    clock = ManualClock(100.0)
    with Collector() as collector:
        tracing = open_tracing(collector.endpoint + "/", service="baton-test", instance="one", clock=clock)
        began_ns = time.time_ns()
        root = tracing.span("chat", parent=CLIENT, kind=Kind.SERVER, attributes={"tokens": 5, "stream": True})
        clock.advance(0.010)
        child = tracing.span("handoff", parent=root.traceparent, kind=Kind.PRODUCER, at_s=100.002)
        child.event("last chunk", {"wire": "shm"}, at_s=100.005)
        child.end(at_s=100.007, error="broken")
        child.end(at_s=100.009)
        root.set({"status": 200, "ratio": 0.5})
        root.end()
        tracing.close(20.0)
        spans = {span.name: span for span in collector.wait(lambda seen: len(seen) == 2, "both spans")}
        assert collector.paths == {"/v1/traces"}
    parent, part = spans["chat"], spans["handoff"]
    assert (parent.service, parent.instance, parent.kind) == ("baton-test", "one", "server")
    assert (parent.trace_id, parent.parent_id) == (TRACE, PARENT)
    assert (part.trace_id, part.parent_id, part.kind) == (TRACE, parent.span_id, "producer")
    assert root.traceparent.startswith(f"00-{TRACE}-{parent.span_id}-")
    assert parent.attributes == {"tokens": 5, "stream": True, "status": 200, "ratio": 0.5}
    assert (parent.error, part.error) == (None, "broken")
    assert parent.end_ns - parent.begin_ns == 10_000_000
    assert (part.begin_ns - parent.begin_ns, part.end_ns - parent.begin_ns) == (2_000_000, 7_000_000)
    assert [(name, at_ns - parent.begin_ns, facts) for name, at_ns, facts in part.events] == [
        ("last chunk", 5_000_000, {"wire": "shm"})
    ]
    assert abs(parent.begin_ns - began_ns) < 60e9, "time of day, not of the clock"


def test_a_trace_that_is_not_sampled_is_not_sent_but_goes_on() -> None:
    with Collector() as collector:
        tracing = tracing_to(collector.endpoint)
        quiet = tracing.span("quiet", parent=f"00-{TRACE}-{PARENT}-00")
        quiet.end()
        assert quiet.traceparent.startswith(f"00-{TRACE}-")
        assert quiet.traceparent.endswith("-00")
        tracing.span("loud", parent="nonsense").end()
        tracing.close(20.0)
        spans = collector.wait(lambda seen: bool(seen), "the other one")
    assert [(span.name, span.parent_id) for span in spans] == [("loud", "")]
    assert spans[0].trace_id != TRACE


def test_an_outage_is_logged_once_and_its_end_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "BATCH_EVERY_MS", 20)
    caplog.set_level(logging.INFO)
    with Collector() as collector:
        collector.status = 400  # not worth a retry
        tracing = tracing_to(collector.endpoint)
        for number in range(3):
            tracing.span(f"lost-{number}", parent="").end()
            collector.wait_requests(number + 1)
        collector.status = 200
        tracing.span("kept", parent="").end()
        spans = collector.wait(lambda seen: bool(seen), "the span after the outage")
        tracing.close(20.0)
    assert [span.name for span in spans] == ["kept"]
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert [text for text in told if "lost" in text] == [
        f"spans are lost: {collector.endpoint}/v1/traces takes none; is it an OTLP/HTTP collector, and running?"
    ]
    assert sum("arrive again" in text for text in told) == 1
    assert not [record for record in caplog.records if record.name.startswith(("opentelemetry", "urllib3"))]


def test_the_end_does_not_wait_for_a_collector_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "SEND_S", 600.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, answers none
        tracing = tracing_to(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        tracing.span("chat", parent="").end()
        tracing.close(0.2)
    assert "the last spans were not sent within 0.2 s" in caplog.text
