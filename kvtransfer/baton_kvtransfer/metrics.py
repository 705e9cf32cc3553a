"""Counters and histograms of one endpoint, on the registry that it is given. Updated from transfer threads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class TransferMetrics:
    """`direction` is "out" (we send KV) or "in"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "baton_kvtransfer"
        by_link = ("direction", "wire")
        self.bytes = Counter(f"{prefix}_bytes", "KV payload moved, resends included", by_link, registry=registry)
        self.chunks = Counter(f"{prefix}_chunks", "Chunks moved, resends included", by_link, registry=registry)
        self.resends = Counter(f"{prefix}_resends", "Chunks sent again", registry=registry)
        self.digest_failures = Counter(f"{prefix}_digest_failures", "Chunks that arrived damaged", registry=registry)
        self.committed = Counter(f"{prefix}_committed", "Transfers that ended well", ("direction",), registry=registry)
        self.failed = Counter(
            f"{prefix}_failed", "Transfers that ended with an error", ("direction", "error"), registry=registry
        )
        self.fences = Counter(
            f"{prefix}_fences", "Links cut because the peer was gone or broke rules", registry=registry
        )
        self.links = Gauge(f"{prefix}_links", "Links that are up", ("direction",), registry=registry)
        self.free_slots = Gauge(f"{prefix}_free_slots", "Credits in hand over all outgoing links", registry=registry)
        self.handoff_seconds = Histogram(
            f"{prefix}_handoff_seconds", "First chunk to commit", ("direction",), buckets=_SECONDS, registry=registry
        )
        self.exposed_seconds = Histogram(
            f"{prefix}_exposed_seconds",
            "finish() to commit: what the transfer adds",
            buckets=_SECONDS,
            registry=registry,
        )
