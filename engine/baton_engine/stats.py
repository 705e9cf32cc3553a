"""What an engine says about itself: one frozen snapshot, refreshed by the engine thread, read by any other."""

from __future__ import annotations

from dataclasses import dataclass

from baton_engine.sched.records import SchedulerLoad
from baton_engine.step import StepPlan

REFRESH_S = 0.02  # a snapshot per step would cost more than a small model's step
_WEIGHT = 0.1  # of the newest step in the moving averages


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """For load messages, metrics and health; `steps` advances as long as the engine does anything."""

    steps: int
    empty: bool  # no request is anywhere: inbox, queue, rows, reservations, fences
    queued_requests: int
    queued_tokens: int  # prompt tokens of waiting and running requests that are not computed yet
    running: int  # requests that hold a row
    reserved: int  # requests that hold pages and wait for their KV, or for a row
    free_pages: int
    cached_pages: int  # in the prefix tree, held by nobody
    leased_pages: int  # held by requests
    in_flight_pages: int  # held by a fence alone
    total_pages: int
    step_ms: float  # moving average of the device time of a step
    prefill_tokens_per_s: float  # moving average over steps that are mostly prefill
    filling: int = 0  # requests that hold pages while KV of their prompt comes from elsewhere, or wait for a row then
    unsent_tokens: int = 0  # KV that was announced and has not left; far ahead, no PREFILL request is admitted
    sending: int = 0  # requests whose KV is on its way to another worker
    preemptions: int = 0  # since start


class StatsKeeper:
    """Written by the engine thread; `snapshot` may be called by any."""

    def __init__(self, load: SchedulerLoad) -> None:
        self._steps = 0
        self._step_ms = 0.0
        self._prefill_tokens_per_s = 0.0
        self._load = load
        self._refreshed_s = 0.0

    def stepped(self, plan: StepPlan, elapsed_s: float) -> None:
        self._steps = plan.number
        self._step_ms = _average(self._step_ms, elapsed_s * 1e3)
        tokens = plan.tokens
        decodes = sum(not item.input_ids for item in plan.work)
        if tokens > 2 * decodes and elapsed_s > 0:
            self._prefill_tokens_per_s = _average(self._prefill_tokens_per_s, (tokens - decodes) / elapsed_s)

    def due(self, now_s: float) -> bool:
        return now_s - self._refreshed_s >= REFRESH_S

    def refresh(self, load: SchedulerLoad, now_s: float) -> None:
        self._load = load
        self._refreshed_s = now_s

    def snapshot(self, *, empty: bool) -> EngineStats:
        load = self._load
        return EngineStats(
            steps=self._steps,
            empty=empty,
            queued_requests=load.queued_requests,
            queued_tokens=load.queued_tokens,
            running=load.prefilling + load.running,
            reserved=load.reserved,
            filling=load.filling,
            unsent_tokens=load.unsent_tokens,
            sending=load.sending,
            preemptions=load.preemptions,
            free_pages=load.pages.free,
            cached_pages=load.pages.cached,
            leased_pages=load.pages.leased,
            in_flight_pages=load.pages.in_flight,
            total_pages=load.total_pages,
            step_ms=self._step_ms,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )


def _average(old: float, new: float) -> float:
    return new if old == 0.0 else old + _WEIGHT * (new - old)
