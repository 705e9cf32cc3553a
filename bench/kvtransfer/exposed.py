"""Row of the exposed tail: what a handoff adds to the time to the first token when layers leave as they are computed.

Only the last layer's share can be left when the prefill ends; the goal is that share, alone, and five milliseconds.
"""

from __future__ import annotations

import statistics

from bench.kvtransfer.contenders import OurWire
from bench.kvtransfer.shapes import LLAMA
from bench.report import Report, Row

LAYER_S = 0.01
SPARE_MS = 5.0
REPEATS = 9


def measure(report: Report, seconds: float) -> None:
    for wire in ("shm", "tcp"):
        pair = OurWire(wire, LLAMA, digest=True)
        try:
            add_row(report, pair, f"exposed tail, {wire}, 8 MiB a layer")
        finally:
            pair.close()


def add_row(report: Report, pair: OurWire, title: str) -> None:
    pair.once()
    layer_ms = statistics.median(pair.once() for _ in range(REPEATS)) / pair.shape.layout.layers * 1e3
    exposed_ms = statistics.median(pair.exposed_s(LAYER_S) for _ in range(REPEATS)) * 1e3
    report.add(
        Row(name=title, value=exposed_ms, unit="ms", goal=round(layer_ms + SPARE_MS, 2), lower_is_better=True,
            note=f"the last layer alone: {layer_ms:.2f} ms")
    )  # fmt: skip
