"""How long a call takes: percentiles over many calls, each on other memory than the one before.

A call shorter than `GRAPHED_S` is timed as part of a graph of many: alone it would measure the launch, which a serving
engine does not pay because it replays graphs too. It knows neither kernels nor torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from bench.gpu.card import Call, Gpu

GRAPHED_S = 100e-6  # of the floor: longer calls hide their launches behind the one before
GRAPH_S = 500e-6  # floor of one replay
MOST_RECORDED = 512  # calls in a graph
BATCH_S = 0.1  # between two looks at the clock
LEAST_SAMPLES, MOST_SAMPLES = 5, 500
WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call."""

    p10_s: float
    p50_s: float
    p90_s: float
    samples: int
    calls: int  # in the graph that was a sample; 1: timed alone
    note: str = ""  # why it was not recorded though it is short


def measure(
    gpu: Gpu, calls: Sequence[Call], floor_s: float, budget_s: float, clock: Callable[[], float] = time.monotonic
) -> Timing:
    """Time `calls`, equal but for the memory they touch, in turn, for about `budget_s`."""
    for call in islice(cycle(calls), max(WARM_UP_CALLS, len(calls))):
        call()
    recorded, note = 1, ""
    turns = cycle(calls)
    sample: Call = lambda: next(turns)()  # noqa: E731
    if floor_s < GRAPHED_S:
        wanted = min(max(len(calls), math.ceil(GRAPH_S / max(floor_s, 1e-9))), MOST_RECORDED)
        try:
            sample = gpu.record(list(islice(cycle(calls), wanted)))
            recorded = wanted
        except RuntimeError as error:
            note = f"no graph: {' '.join(str(error).split())[:80]}"
    laps = _laps(gpu, sample, budget_s, clock)
    found = sorted(lap / recorded for lap in laps)
    return Timing(
        p10_s=percentile(found, 0.1), p50_s=percentile(found, 0.5), p90_s=percentile(found, 0.9),
        samples=len(found), calls=recorded, note=note,
    )  # fmt: skip


def _laps(gpu: Gpu, sample: Call, budget_s: float, clock: Callable[[], float]) -> list[float]:
    began = clock()
    laps = gpu.laps(sample, LEAST_SAMPLES)
    while clock() - began < budget_s and len(laps) < MOST_SAMPLES:
        batch = BATCH_S / max(laps[-1], 1e-6)
        laps += gpu.laps(sample, max(1, min(int(batch), MOST_SAMPLES - len(laps))))
    return laps


def percentile(ordered: Sequence[float], part: float) -> float:
    """Of ascending values, linear between neighbours."""
    at = part * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
