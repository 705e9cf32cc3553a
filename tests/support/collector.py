"""A collector of spans: OTLP over HTTP as OpenTelemetry's has it, reduced to one list. Runs in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

SPANS_S = 30.0


@dataclass(frozen=True)
class SeenSpan:
    """One span as it came; ids in hex, times in ns of the day."""

    service: str
    instance: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    error: str | None  # None = no error


class Collector:
    """`with Collector() as collector`: `collector.endpoint` is the setting. `status`: what it answers."""

    def __init__(self) -> None:
        self.spans: list[SeenSpan] = []
        self.paths: set[str] = set()
        self.requests = 0
        self.status = 200
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, enough: Callable[[list[SeenSpan]], bool], what: str) -> list[SeenSpan]:
        """All spans, once they are enough."""
        end_s = time.monotonic() + SPANS_S
        with self._changed:
            while not enough(self.spans):
                seen = [(span.service, span.name) for span in self.spans]
                assert self._changed.wait(end_s - time.monotonic()), f"never came: {what}; seen: {seen}"
            return list(self.spans)

    def wait_requests(self, count: int) -> None:
        """Until somebody tried so many times."""
        end_s = time.monotonic() + SPANS_S
        with self._changed:
            while self.requests < count:
                assert self._changed.wait(end_s - time.monotonic()), f"{self.requests} of {count} requests came"

    def _take(self, path: str, body: bytes) -> int:
        with self._changed:
            self.requests += 1
            self.paths.add(path)
            if self.status == 200:
                self.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self._changed.notify_all()
            return self.status

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.headers["content-type"] == "application/x-protobuf"
                status = take(self.path, self.rfile.read(int(self.headers["content-length"])))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Tests are quiet."""

        return Handler


def _spans(request: ExportTraceServiceRequest) -> list[SeenSpan]:
    found = []
    for group in request.resource_spans:
        resource = _values(group.resource.attributes)
        for scope in group.scope_spans:
            found += [_span(span, resource) for span in scope.spans]
    return found


def _span(span: WireSpan, resource: dict[str, Any]) -> SeenSpan:
    return SeenSpan(
        service=resource["service.name"],
        instance=resource["service.instance.id"],
        name=span.name,
        kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=[(event.name, event.time_unix_nano, _values(event.attributes)) for event in span.events],
        error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
    )


def _values(attributes: list[KeyValue]) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
