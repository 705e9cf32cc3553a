"""Counters and histograms of one endpoint, on the registry that it is given. Updated from transfer threads."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from baton_kvtransfer.records import Direction

_RATE_OVER_S = 1.0
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
        self.aborts = Counter(
            f"{prefix}_aborts", "Transfers that one of the two sides gave up", ("direction",), registry=registry
        )
        self.fences = Counter(
            f"{prefix}_fences", "Links cut because the peer was gone or broke rules", registry=registry
        )
        self.links = Gauge(f"{prefix}_links", "Links that are up", ("direction",), registry=registry)
        self.free_slots = Gauge(f"{prefix}_free_slots", "Credits in hand over all outgoing links", registry=registry)
        self.pair_bytes_per_second = Gauge(
            f"{prefix}_pair_bytes_per_second",
            "KV payload that moves between this worker and a peer, over the last second or longer",
            ("direction", "peer"),
            registry=registry,
        )
        self.posting_seconds = Summary(
            f"{prefix}_posting_seconds",
            "Handing a gathered chunk to the wire, on the link's thread",
            ("wire",),
            registry=registry,
        )
        self.handoff_seconds = Histogram(
            f"{prefix}_handoff_seconds", "First chunk to commit", ("direction",), buckets=_SECONDS, registry=registry
        )
        self.exposed_seconds = Histogram(
            f"{prefix}_exposed_seconds",
            "finish() to commit: what the transfer adds",
            buckets=_SECONDS,
            registry=registry,
        )


class LinkMetrics:
    """What one link that is up counts per chunk: its series are looked up once. Owned by the link's thread."""

    def __init__(self, metrics: TransferMetrics, *, direction: Direction, peer: str, wire: str, now_s: float) -> None:
        self._metrics = metrics
        self._pair = (direction, peer)
        self._bytes = metrics.bytes.labels(direction, wire)
        self._chunks = metrics.chunks.labels(direction, wire)
        self._posting = metrics.posting_seconds.labels(wire)
        self._moved = 0  # bytes since `_since_s`
        self._since_s = now_s
        metrics.links.labels(direction).inc()
        self.tick(now_s + _RATE_OVER_S)

    def moved(self, size: int) -> None:
        """One chunk of that many bytes."""
        self._moved += size
        self._bytes.inc(size)
        self._chunks.inc()

    def posted(self, seconds: float) -> None:
        self._posting.observe(seconds)

    def tick(self, now_s: float) -> None:
        """Call about every heartbeat."""
        elapsed_s = now_s - self._since_s
        if elapsed_s >= _RATE_OVER_S:
            self._metrics.pair_bytes_per_second.labels(*self._pair).set(self._moved / elapsed_s)
            self._moved, self._since_s = 0, now_s

    def close(self) -> None:
        """The link is over: a rate of the past says nothing."""
        self._metrics.links.labels(self._pair[0]).dec()
        with contextlib.suppress(KeyError):  # gone with an older link of the same pair
            self._metrics.pair_bytes_per_second.remove(*self._pair)
