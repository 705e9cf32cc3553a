"""Counters and gauges of the storage tiers, on the registry that they are given. Updated from any thread.

`tier` is "host", "file", "mooncake"; `reason` of a page that was not kept: "queue" (too much to do), "room" (all of the
host pool is in use), "refused" (the tier has no room), "copy" (the pool could not be read).
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge


class TierMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "baton_tier"

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{prefix}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{prefix}_{name}", text, labels, registry=registry)

        self.hits = count("hits", "Pages that a prefetch found", "tier")
        self.misses = count("misses", "Pages that a tier was asked for and did not give", "tier")
        self.bytes = count("bytes", "Payload written to (in) and read from (out) a tier", "tier", "direction")
        self.evictions = count("evictions", "Pages that made room for others", "tier")
        self.damaged = count("digest_failures", "Pages that came back other than they went, and were deleted", "tier")
        self.skipped = count("skipped", "Pages that were not kept", "tier", "reason")
        self.faults = count("faults", "Calls that failed or took too long", "tier", "call")
        self.off = gauge("off", "1 while a tier is left alone after a failure", "tier", "call")
        self.stored = gauge("stored_bytes", "That a tier takes of this machine", "tier")
        self.pinned = gauge("pinned_pages", "Pages that sessions hold in the host pool")

    def begin(self, tier: str, *, calls: Sequence[str], reasons: Sequence[str]) -> None:
        """Its series at zero: a counter that appears with its first event shows no rise."""
        for counter in (self.hits, self.misses, self.evictions, self.damaged):
            counter.labels(tier)
        for direction in ("in", "out"):
            self.bytes.labels(tier, direction)
        for reason in reasons:
            self.skipped.labels(tier, reason)
        for call in calls:
            self.faults.labels(tier, call)
            self.off.labels(tier, call).set(0)
