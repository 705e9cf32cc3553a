"""What a worker says about itself: progress on a manual clock, metrics, and the file that a crash leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from baton_common.clock import ManualClock
from baton_engine.engine import EngineStats
from baton_worker.crash import write_dump
from baton_worker.state import EngineMetrics, Progress, load_message, page_counts

IDLE = EngineStats(
    steps=7, empty=True, queued_requests=0, queued_tokens=0, running=0, reserved=0, sending=0, preemptions=0,
    free_pages=5, cached_pages=3, leased_pages=0, in_flight_pages=0, total_pages=8, step_ms=1.5,
    prefill_tokens_per_s=9.0,
)  # fmt: skip
BUSY = dataclasses.replace(IDLE, running=2, leased_pages=2, free_pages=3)


def test_work_without_a_step_is_unhealthy_only_after_the_limit() -> None:
    clock = ManualClock()
    progress = Progress(stall_s=10, clock=clock)
    assert progress.observe(BUSY)
    clock.advance(10)
    assert progress.observe(BUSY)
    clock.advance(0.1)
    assert not progress.observe(BUSY)
    assert progress.observe(dataclasses.replace(BUSY, steps=8))


def test_time_without_work_does_not_count() -> None:
    clock = ManualClock()
    progress = Progress(stall_s=10, clock=clock)
    for stats in (IDLE, IDLE, BUSY):
        assert progress.observe(stats)
        clock.advance(9)


@pytest.mark.parametrize(
    ("stats", "healthy"),
    [
        (dataclasses.replace(IDLE, queued_requests=1), False),
        (dataclasses.replace(IDLE, queued_requests=1, reserved=1, leased_pages=8), True),
        (dataclasses.replace(IDLE, reserved=1, leased_pages=2), True),
    ],
    ids=["a queue and an empty house", "a queue behind reservations", "reservations wait for KV"],
)
def test_waiting_for_others_is_not_a_stall(stats: EngineStats, healthy: bool) -> None:
    clock = ManualClock()
    progress = Progress(stall_s=10, clock=clock)
    progress.observe(stats)
    clock.advance(11)
    assert progress.observe(stats) is healthy


def test_load_counts_evictable_pages_as_free() -> None:
    load = load_message(BUSY, sequence=4, handoffs=2, draining=True)
    assert (load.free_pages, load.total_pages, load.running, load.handoffs, load.draining) == (6, 8, 2, 2, True)
    pages = page_counts(BUSY)
    assert pages.free + pages.cached + pages.leased + pages.in_flight == pages.total


def test_metrics_show_the_engine_as_it_is_at_the_scrape() -> None:
    registry = CollectorRegistry()
    current = [IDLE]
    registry.register(EngineMetrics(lambda: current[0], lambda: 3, lambda: {("attention", "torch"): 2}))
    current[0] = BUSY
    text = generate_latest(registry).decode()
    assert 'baton_engine_pages{state="leased"} 2.0' in text
    assert "baton_engine_steps_total 7.0" in text
    assert "baton_worker_handoffs_total 3.0" in text
    assert 'baton_engine_kernel_fallbacks_total{op="attention",with="torch"} 2.0' in text


def test_a_crash_dump_holds_the_engine_and_the_traceback(tmp_path: Path) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        path = write_dump(
            tmp_path / "new", worker_id="127.0.0.1:9001", incarnation="abc", error=error, engine={"plan": (1, 2)}
        )
    dump = json.loads(path.read_text())
    assert path.name == "baton-crash-127.0.0.1-9001-abc.json"
    assert (dump["error"], dump["engine"]) == ("RuntimeError: broken", {"plan": [1, 2]})
    assert any("test_state.py" in line for line in dump["traceback"])
