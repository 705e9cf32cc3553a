"""Spans of requests, as OpenTelemetry has them: what a program says, and where they go. Off unless told a collector.

Times are seconds on the clock that was given to `open_tracing`; the collector gets them as time of day. Traces are
joined by W3C `traceparent` texts: a parent that cannot be read begins a new trace. Invariants: nothing here blocks (but
`close`, which is bounded) or raises after `open_tracing`; a collector that is away costs its spans and nothing else.
Without an endpoint no library is loaded, no thread is started and a span is one constant object.
It does not know what a request is.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, Protocol
from urllib.parse import urlsplit

from baton_common.clock import Clock
from baton_common.errors import ConfigError

Attributes = Mapping[str, str | int | float | bool]
NONE: Final[Attributes] = {}


class Kind(Enum):
    """As in OpenTelemetry."""

    INTERNAL = "internal"
    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Span(Protocol):
    """One interval of work. Use from one thread."""

    @property
    def traceparent(self) -> str:
        """Names this span as the parent of others, in this process or elsewhere."""

    def set(self, attributes: Attributes) -> None:
        """Later values replace earlier ones."""

    def event(self, name: str, attributes: Attributes = NONE, *, at_s: float | None = None) -> None:
        """Something that happened meanwhile; `at_s` None = now."""

    def end(self, *, error: str = "", at_s: float | None = None) -> None:
        """The interval is over; `error` says what it failed of. The first call counts."""


class Tracing(Protocol):
    """Makes spans and sends them."""

    def span(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = Kind.INTERNAL,
        at_s: float | None = None,
        attributes: Attributes = NONE,
    ) -> Span:
        """Begin one. `parent`: a traceparent, "" = a trace of its own; `at_s` None = now."""

    def close(self, within_s: float) -> None:
        """Send what is left, for at most so long. Blocks. Spans that end later are dropped."""


class Unrecorded:
    """A span that nobody will see; whoever was before it stays the parent."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent: Final = traceparent

    def set(self, attributes: Attributes) -> None:
        """Nothing."""

    def event(self, name: str, attributes: Attributes = NONE, *, at_s: float | None = None) -> None:
        """Nothing."""

    def end(self, *, error: str = "", at_s: float | None = None) -> None:
        """Nothing."""


class _Off:
    def span(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = Kind.INTERNAL,
        at_s: float | None = None,
        attributes: Attributes = NONE,
    ) -> Span:
        return Unrecorded(parent) if parent else UNRECORDED

    def close(self, within_s: float) -> None:
        """Nothing."""


UNRECORDED: Final[Span] = Unrecorded()
OFF: Final[Tracing] = _Off()


def open_tracing(endpoint: str, *, service: str, instance: str, clock: Clock) -> Tracing:
    """Spans of `instance` of `service` to the OTLP/HTTP collector at `endpoint` (http://host:4318); "" = no spans.

    Raises ConfigError for what is no such address; whether anybody answers there is found out later, and only logged.
    """
    if not endpoint:
        return OFF
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(
            f"otlp_endpoint {endpoint!r} is no collector's address; write http://host:4318 (OTLP over HTTP)",
            param="otlp_endpoint",
        )
    from baton_common.otlp import OtlpTracing  # a third of a second and 20 MB that only those pay who trace

    return OtlpTracing(endpoint.rstrip("/") + "/v1/traces", service=service, instance=instance, clock=clock)
