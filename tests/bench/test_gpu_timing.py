"""Percentiles of a call: short ones inside a graph, each call on other memory, within a budget."""

import itertools

import pytest
from support.host_gpu import ScriptedGpu

from bench.gpu.timing import LEAST_SAMPLES, MOST_SAMPLES, measure, percentile


def test_percentiles_lie_between_neighbours():
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert percentile([7.0], 0.9) == 7.0


def test_a_long_call_is_timed_alone():
    gpu = ScriptedGpu()
    times = itertools.cycle([1e-3, 2e-3, 3e-3])
    timing = measure(gpu, [lambda: next(times)], floor_s=0.9e-3, budget_s=0.1, clock=gpu.clock)
    assert gpu.recorded == []
    assert timing.calls == 1
    assert (timing.p10_s, timing.p50_s, timing.p90_s) == pytest.approx((1e-3, 2e-3, 3e-3))


def test_a_short_call_is_timed_in_a_graph_of_all_its_inputs():
    gpu, seen = ScriptedGpu(), []
    calls = [lambda index=index: seen.append(index) or 2e-6 for index in range(64)]
    timing = measure(gpu, calls, floor_s=0.5e-6, budget_s=0.05, clock=gpu.clock)
    assert gpu.recorded == [512]  # at most
    assert timing.calls == 512
    assert timing.p50_s == pytest.approx(2e-6)
    assert seen[64 : 2 * 64] == list(range(64))  # behind the warm-up: in turn


def test_a_call_that_cannot_be_recorded_is_timed_alone_and_says_so():
    gpu = ScriptedGpu(refuses_graphs="operation not permitted when stream is capturing")
    timing = measure(gpu, [lambda: 4e-6], floor_s=1e-6, budget_s=0.01, clock=gpu.clock)
    assert timing.calls == 1
    assert timing.note == "no graph: operation not permitted when stream is capturing"


@pytest.mark.parametrize(("lap_s", "samples"), [(10.0, LEAST_SAMPLES), (1e-6, MOST_SAMPLES)])
def test_the_budget_bounds_the_samples(lap_s, samples):
    gpu = ScriptedGpu()
    assert measure(gpu, [lambda: lap_s], floor_s=1.0, budget_s=0.5, clock=gpu.clock).samples == samples
