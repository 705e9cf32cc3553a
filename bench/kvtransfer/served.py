"""Rows of a whole service: what the handover from a prefill worker to a decode worker costs a client.

From token #1 (made by prefill) to token #2 (made by decode), less one decode step, the median of the later gaps of the
same answer. The transfer itself is a part of it and is not subtracted, so that the true figure is smaller.
"""

from __future__ import annotations

import random
import socket
import statistics
import tempfile
from pathlib import Path

from bench.report import Report, Row
from bench.service import REPOSITORY, Service, running

MODEL = REPOSITORY / "demo_model" / "checkpoint"
VOCAB = 2000
PROMPT_TOKENS = 256
OUTPUTS = 12
WARM_UP, REQUESTS = 5, 40
GOAL_MS = 20.0


def measure(report: Report, seconds: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as folder,
        running(MODEL, Path(folder), port=port) as service,
    ):
        values = sorted([_handover_ms(service, seed) for seed in range(WARM_UP + REQUESTS)][WARM_UP:])
    report.add(
        Row(name="handover − one decode step, p50", value=statistics.median(values), unit="ms", goal=GOAL_MS,
            lower_is_better=True,
            note=f"demo model, {PROMPT_TOKENS} tokens, {len(values)} requests, p90 {values[len(values) * 9 // 10]:.1f}")
    )  # fmt: skip


def _handover_ms(service: Service, seed: int) -> float:
    chance = random.Random(seed)
    prompt = [chance.randrange(10, VOCAB) for _ in range(PROMPT_TOKENS)]
    _, to_second, *later = service.gaps(prompt, OUTPUTS)
    return (to_second - statistics.median(later)) * 1e3
