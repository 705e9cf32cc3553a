"""Spans by the OpenTelemetry SDK, sent in batches as OTLP over HTTP by a thread of the SDK.

Sampling follows the parent, else OTEL_TRACES_SAMPLER; OTEL_RESOURCE_ATTRIBUTES and OTEL_EXPORTER_OTLP_HEADERS are
heard as everywhere. Invariants: at most QUEUE_SPANS wait, more are dropped; an outage is logged when it begins and when
it ends, not for each batch. Loaded only when spans are wanted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton_common.clock import Clock
from baton_common.telemetry import NONE, Attributes, Kind, Span

log = logging.getLogger("baton.telemetry")

CLOCK_STEP_NS = 50_000_000
"""The time of day was set anew: spans that begin from now on follow it."""
QUEUE_SPANS = 8192
BATCH_SPANS = 512
BATCH_EVERY_MS = 1000
SEND_S = 5.0
"""For one batch, with its retries."""

_PARENTS = TraceContextTextMapPropagator()


class OtlpTracing:
    """Owner of the sending thread. As `telemetry.Tracing`; spans may be made by several threads."""

    def __init__(self, url: str, *, service: str, instance: str, clock: Clock) -> None:
        for name in ("opentelemetry", "urllib3"):  # what they say of an outage is said by `_Sender`, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _Sender(OTLPSpanExporter(endpoint=url, timeout=SEND_S), url),
                max_queue_size=QUEUE_SPANS,
                schedule_delay_millis=BATCH_EVERY_MS,
                max_export_batch_size=BATCH_SPANS,
                export_timeout_millis=SEND_S * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("baton")
        self._clock = clock
        self._epoch_ns = self._epoch_now_ns()
        log.info("spans go to %s", url)

    def span(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = Kind.INTERNAL,
        at_s: float | None = None,
        attributes: Attributes = NONE,
    ) -> Span:
        epoch_ns = self._epoch_now_ns()
        if abs(epoch_ns - self._epoch_ns) > CLOCK_STEP_NS:
            self._epoch_ns = epoch_ns
        begin_ns = self.wall_ns(at_s)
        made = self._tracer.start_span(
            name,
            context=_PARENTS.extract({"traceparent": parent}),
            kind=trace.SpanKind[kind.name],
            attributes=attributes,
            start_time=begin_ns,
        )
        return _Recorded(made, self, begin_ns)

    def close(self, within_s: float) -> None:
        closer = threading.Thread(target=self._provider.shutdown, name="baton-spans-close", daemon=True)
        closer.start()
        closer.join(within_s)
        if closer.is_alive():
            log.warning("the last spans were not sent within %g s", within_s)

    def wall_ns(self, at_s: float | None) -> int:
        """Time of day. The offset is held still, which keeps the order of what one clock stamped."""
        return self._epoch_ns + round((self._clock.now() if at_s is None else at_s) * 1e9)

    def _epoch_now_ns(self) -> int:
        return time.time_ns() - round(self._clock.now() * 1e9)


class _Recorded:
    """A span that will be sent, unless its trace is not sampled."""

    __slots__ = ("_begin_ns", "_ended", "_span", "_tracing", "traceparent")

    def __init__(self, span: trace.Span, tracing: OtlpTracing, begin_ns: int) -> None:
        self._span = span
        self._tracing = tracing
        self._begin_ns = begin_ns
        self._ended = False
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes = NONE, *, at_s: float | None = None) -> None:
        self._span.add_event(name, attributes, self._tracing.wall_ns(at_s))

    def end(self, *, error: str = "", at_s: float | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if error:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        self._span.end(max(self._tracing.wall_ns(at_s), self._begin_ns))


class _Sender(SpanExporter):
    """Says once that spans are lost, and once that they arrive again."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._lost_spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost_spans:
                log.warning("spans are lost: %s takes none; is it an OTLP/HTTP collector, and running?", self._url)
            self._lost_spans += len(spans)
        elif self._lost_spans:
            log.info("spans arrive again", extra={"lost_spans": self._lost_spans})
            self._lost_spans = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
