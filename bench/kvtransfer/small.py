"""Rows of a small handoff: one chunk of 16 KiB, its reservation made before, on threads that slept meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.kvtransfer.contenders import OurWire
from bench.kvtransfer.remote import RemoteFailed
from bench.kvtransfer.shapes import SMALL
from bench.report import Report, Row

GOALS_US = {"p50": 50.0, "p99": 500.0}
WARM_UP = 50
LEAST = 300


def measure(report: Report, seconds: float) -> None:
    for wire in ("shm", "tcp", "nixl", "mooncake"):
        try:
            pair = OurWire(wire, SMALL, digest=True)
        except RemoteFailed as error:
            print(f"  {wire} is left out: {str(error).strip().splitlines()[-1]}", flush=True)
            continue
        try:
            received, receipts = _latencies(pair, seconds)
        finally:
            pair.close()
        for what, values in (("to on_received", received), ("to the receipt", receipts)):
            for quantile, value in (("p50", _quantile(values, 0.5)), ("p99", _quantile(values, 0.99))):
                report.add(
                    Row(name=f"{wire}, 16 KiB {what}, {quantile}", value=value * 1e6, unit="us",
                        goal=GOALS_US[quantile] if wire == "shm" else None, lower_is_better=True,
                        note=f"{len(values)} handoffs")
                )  # fmt: skip


def _latencies(pair: OurWire, seconds: float) -> tuple[list[float], list[float]]:
    for _ in range(WARM_UP):
        pair.send(1)
    received: list[float] = []
    receipts: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(received) < LEAST or time.perf_counter() < end_s:
        begin_s, received_s, receipt_s = pair.send(1)
        received.append(received_s - begin_s)
        receipts.append(receipt_s - begin_s)
    return received, receipts


def _quantile(values: Sequence[float], at: float) -> float:
    return sorted(values)[int(len(values) * at)]
