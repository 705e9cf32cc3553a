"""Prometheus families of the router. One registry per process, handed around; single-threaded by design (event loop).

Latencies are observed once per step and stream, so they use a plain array instead of the client library's locked
histogram.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_PROBE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

UNKNOWN_ROLE = "unknown"
"""Of a worker that has not introduced itself."""


class Latency(Collector):
    """A histogram without locks; `observe` is two array writes."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, bounds_s: Sequence[float]) -> None:
        self._name, self._text, self._bounds_s = name, text, bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterable[Metric]:
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds_s), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], buckets=buckets, sum_value=self._sum_s)
        yield family


class _Workers(Collector):
    def __init__(self, rows: Callable[[], Iterable[tuple[str, str, bool]]]) -> None:
        self._rows = rows

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "baton_router_worker_up", "1 while the worker takes requests", labels=["address", "role"]
        )
        workers: dict[tuple[str, str], bool] = {}
        for address, role, up in self._rows():
            # two pods, one that leaves and its successor, may have one address for a moment
            workers[address, role] = up or workers.get((address, role), False)
        registered = GaugeMetricFamily(
            "baton_router_registered_workers", "workers whose stream this router holds", labels=["role"]
        )
        roles = [role for _, role in workers]
        for (address, role), up in workers.items():
            family.add_metric([address, role], float(up))
        for role in sorted(set(roles) - {UNKNOWN_ROLE}):
            registered.add_metric([role], float(roles.count(role)))
        yield from (family, registered)


class RouterMetrics:
    """Everything the router counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.inflight = Gauge("baton_router_inflight", "requests being answered", registry=self.registry)
        self.requests = self._counter("requests", "answers by endpoint and code", "endpoint", "code")
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens received")
        self.output_tokens = self._counter("output_tokens", "tokens sent")
        self.cached_tokens = self._counter("cached_tokens", "prompt tokens found in a cache")
        self.disconnects = self._counter("client_disconnects", "clients that left before the end")
        self._retries = self._counter("retries", "attempts that had to be repeated", "reason")
        self._placed = self._counter("placed", "attempts by how the prompt was computed", "how")
        self._migrations = self._counter("migrations", "moves away from decode workers that drain", "outcome")
        self.ttft = Latency(self.registry, "baton_router_ttft_seconds", "arrival to first token", _TTFT_S)
        self.itl = Latency(self.registry, "baton_router_itl_seconds", "between two tokens of a choice", _ITL_S)
        self.e2e = Latency(self.registry, "baton_router_request_seconds", "arrival to end of answer", _E2E_S)
        self._endpoints = Gauge(
            "baton_router_endpoints", "addresses of workers found in Kubernetes", registry=self.registry
        )
        self._kube_calls = self._counter(
            "kube_calls", "requests to the API server; code 0: no answer", "verb", "resource", "code"
        )
        self._probes = self._counter("probes", "transport probes by result", "verdict")
        self._probe_bytes = self._counter("probe_bytes", "KV that crossed in transport probes")
        self._probe_s = Latency(
            self.registry, "baton_router_probe_seconds", "exposed tail of a probe's handoff", _PROBE_S
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"baton_router_{name}", text, labels, registry=self.registry)

    def watch_workers(self, rows: Callable[[], Iterable[tuple[str, str, bool]]]) -> None:
        """`rows` yields (address, role, up) whenever metrics are read."""
        self.registry.register(_Workers(rows))

    def retried(self, reason: str) -> None:
        self._retries.labels(reason).inc()

    def placed(self, how: str) -> None:
        """`handoff`: prefill worker; `move`: decode worker that drains; `local_short`: decode, little was uncached;
        `local`: nobody else could."""
        self._placed.labels(how).inc()

    def migrated(self, outcome: str) -> None:
        """`moved`: decodes elsewhere, nothing was computed twice; `refused`: stays for now; `failed`: was retried."""
        self._migrations.labels(outcome).inc()

    def watch_endpoints(self, count: Callable[[], int]) -> None:
        """Asked at each scrape."""
        self._endpoints.set_function(lambda: float(count()))

    def kube_called(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """As `kube.client.CallCounter`."""
        self._kube_calls.labels(verb, resource, str(code)).inc()

    def probed(self, verdict: str, seconds: float, crossed_bytes: int) -> None:
        """`proved`, `failed` or `busy`; time and bytes count when proved."""
        self._probes.labels(verdict).inc()
        if verdict == "proved":
            self._probe_s.observe(seconds)
            self._probe_bytes.inc(crossed_bytes)

    def text(self) -> bytes:
        """Prometheus exposition format."""
        return generate_latest(self.registry)
