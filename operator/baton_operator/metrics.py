"""What the operator counts about itself, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WRITES = frozenset({"apply", "patch", "create", "update", "delete"})


class OperatorMetrics:
    """`api_calls` counts answers and failures (`code` 0: no answer); `writes` those that could change an object."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reconciles = Counter(
            "baton_operator_reconciles", "Passes over one service, by result", ["result"], registry=registry
        )
        self.reconcile_seconds = Histogram(
            "baton_operator_reconcile_seconds", "Duration of a pass", registry=registry, buckets=_SECONDS
        )
        self.queue_depth = Gauge(
            "baton_operator_queue_depth", "Services that are due and wait for a worker", registry=registry
        )
        self.queue_working = Gauge("baton_operator_queue_working", "Services in work", registry=registry)
        self.api_calls = Counter(
            "baton_operator_api_calls", "Requests to the API server", ["verb", "resource", "code"], registry=registry
        )
        self.api_seconds = Histogram(
            "baton_operator_api_seconds", "Duration of a request to the API server", ["verb"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.writes = Counter(
            "baton_operator_writes", "Requests that write; a cluster at rest has none but the Lease's",
            ["verb", "resource"], registry=registry,
        )  # fmt: skip
        self.leader = Gauge("baton_operator_leader", "1 in the replica that leads", registry=registry)
        self.services = Gauge("baton_operator_services", "InferenceServices known", registry=registry)
        self.ready = Gauge(
            "baton_operator_service_ready", "1 when the service is Ready, 0 when not", ["namespace", "service"],
            registry=registry,
        )  # fmt: skip
        self.reviews = Counter(
            "baton_operator_admission_reviews", "Services judged before they are stored, by result", ["result"],
            registry=registry,
        )  # fmt: skip
        self.certificate_expires = Gauge(
            "baton_operator_webhook_certificate_expires_timestamp_seconds",
            "When the certificate that this replica serves with ends; 0: it serves with none", registry=registry,
        )  # fmt: skip

    def counted(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """As `kube.client.CallCounter`."""
        self.api_calls.labels(verb, resource, str(code)).inc()
        self.api_seconds.labels(verb).observe(seconds)
        if verb in WRITES:
            self.writes.labels(verb, resource).inc()

    def watch_queue(self, depth: Callable[[], int], working: Callable[[], int]) -> None:
        """Asked at each scrape."""
        self.queue_depth.set_function(lambda: float(depth()))
        self.queue_working.set_function(lambda: float(working()))
