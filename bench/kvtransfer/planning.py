"""Rows of planning: which block goes into which chunk, and whether each belongs to the transfer, on both sides.

A page here is that of one layer, 4 KiB, as in the rows of bulk transfers; no bytes move. Where its rows lie in the pool
is found per chunk by the copy, and is part of those rows.
"""

from __future__ import annotations

import statistics
import time

from baton_kvtransfer import TransferConfig
from baton_kvtransfer.plan import Coverage, Pending
from bench.kvtransfer.shapes import KIB_4
from bench.report import Report, Row

GOALS_US = {16384: 1000.0, 1024: 50.0}
REPEATS = 200
LAYOUT = KIB_4.layout


def measure(report: Report, seconds: float) -> None:
    for pages, goal in GOALS_US.items():
        tokens = pages // LAYOUT.layers * LAYOUT.page_tokens
        taken = [_once(tokens) for _ in range(REPEATS)]
        report.add(
            Row(name=f"planning of {pages} pages, both sides", value=statistics.median(us for us, _ in taken),
                unit="us", goal=goal, lower_is_better=True, note=f"{taken[0][1]} chunks")
        )  # fmt: skip


def _once(tokens: int) -> tuple[float, int]:
    begin_s = time.perf_counter()
    pending = Pending(layout=LAYOUT, slot_bytes=TransferConfig().slot_bytes, first_token=0, end_token=tokens)
    pending.add(0, LAYOUT.layers, 0, tokens)
    coverage = Coverage(layout=LAYOUT, first_token=0, end_token=tokens)
    chunks = 0
    while (block := pending.take()) is not None:
        if coverage.refuses(block):
            raise RuntimeError("a block that was planned is refused")
        coverage.add(block)
        chunks += 1
    if not coverage.complete:
        raise RuntimeError("the plan does not cover the transfer")
    return (time.perf_counter() - begin_s) * 1e6, chunks
