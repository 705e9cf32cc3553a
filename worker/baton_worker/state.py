"""What this worker says about itself: its state, progress, Load, Status and metrics; all are views of Engine.stats().

Health is progress: work and no step for `stall_s` is not healthy, whatever the port answers.
It does not know streams or gRPC services; `service` asks it and passes the answers on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton_common.clock import Clock
from baton_engine.engine import EngineStats
from baton_proto import worker_pb2

log = logging.getLogger("baton.worker")


class State(Enum):
    """Life of a worker as the outside sees it."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    EMPTY = "empty"  # drained: nothing is running, nothing will be taken


class Progress:
    """Watches the step counter. Fed regularly with fresh stats; clock passed in."""

    def __init__(self, *, stall_s: float, clock: Clock) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._steps = -1
        self._moved_s = clock.now()
        self.healthy = True

    def observe(self, stats: EngineStats) -> bool:
        """True while the counter advances or nothing is there to compute. Logs when the answer changes.

        Requests that wait for their KV, or for pages that such requests hold, are the transfer's business and have its
        deadlines: only rows that compute, or a queue with nothing else in the house, oblige the engine to step.
        """
        now_s = self._clock.now()
        must_step = stats.running > 0 or (stats.queued_requests > 0 and stats.leased_pages + stats.in_flight_pages == 0)
        if stats.steps != self._steps or not must_step:
            self._steps, self._moved_s = stats.steps, now_s
        healthy = now_s - self._moved_s <= self._stall_s
        if healthy != self.healthy:
            fields = {"steps": stats.steps, "running": stats.running, "queued": stats.queued_requests}
            if healthy:
                log.info("the engine steps again", extra=fields)
            else:
                log.error("the engine has work but makes no step; not healthy", extra=fields)
        self.healthy = healthy
        return healthy


def load_message(stats: EngineStats, *, sequence: int, handoffs: int, draining: bool) -> worker_pb2.Load:
    return worker_pb2.Load(
        sequence=sequence,
        steps=stats.steps,
        handoffs=handoffs,
        queued_requests=stats.queued_requests,
        queued_tokens=stats.queued_tokens,
        running=stats.running,
        reserved=stats.reserved,
        free_pages=stats.free_pages + stats.cached_pages,
        total_pages=stats.total_pages,
        step_ms=stats.step_ms,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        draining=draining,
    )


def page_counts(stats: EngineStats) -> worker_pb2.PageCounts:
    return worker_pb2.PageCounts(
        free=stats.free_pages,
        cached=stats.cached_pages,
        leased=stats.leased_pages,
        in_flight=stats.in_flight_pages,
        total=stats.total_pages,
    )


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class EngineMetrics(Collector):
    """Reads the engine at each scrape; keeps nothing itself."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        handoffs: Callable[[], int],
        kernel_fallbacks: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        self._stats = stats
        self._handoffs = handoffs
        self._kernel_fallbacks = kernel_fallbacks

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield CounterMetricFamily("baton_engine_steps", "Steps since the start", value=stats.steps)
        yield CounterMetricFamily("baton_engine_preemptions", "Preemptions since the start", value=stats.preemptions)
        yield CounterMetricFamily("baton_worker_handoffs", "Transfers ended since the start", value=self._handoffs())
        for name, text, value in (
            ("baton_engine_queued_requests", "Requests that wait for admission", stats.queued_requests),
            ("baton_engine_queued_tokens", "Prompt tokens not computed yet", stats.queued_tokens),
            ("baton_engine_running_requests", "Requests that hold a row", stats.running),
            ("baton_engine_reserved_requests", "Requests that wait for their KV", stats.reserved),
            ("baton_engine_filling_requests", "Requests whose KV may come from elsewhere", stats.filling),
            ("baton_engine_unsent_tokens", "Tokens whose KV is computed but has not left", stats.unsent_tokens),
            ("baton_engine_sending_requests", "Requests whose KV is on the way", stats.sending),
            ("baton_engine_step_ms", "Moving average of a step, ms", stats.step_ms),
            ("baton_engine_prefill_tokens_per_s", "Moving average of prefill", stats.prefill_tokens_per_s),
            ("baton_worker_resident_bytes", "Resident memory of the process", resident_bytes()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        pages = GaugeMetricFamily("baton_engine_pages", "KV pages by owner", labels=["state"])
        for owner, count in (
            ("free", stats.free_pages),
            ("cached", stats.cached_pages),
            ("leased", stats.leased_pages),
            ("in_flight", stats.in_flight_pages),
        ):
            pages.add_metric([owner], count)
        yield pages
        fallbacks = CounterMetricFamily(
            "baton_engine_kernel_fallbacks", "Operations on a slower kernel than planned", labels=["op", "with"]
        )
        for (op, instead), count in self._kernel_fallbacks().items():
            fallbacks.add_metric([op, instead], count)
        yield fallbacks
