"""KV handoff between two processes: value, ceiling, fraction. `python -m bench.kvtransfer [seconds per row]`

The ceiling of throughput is memmove by one thread, measured around each row, because machines drift.
A small handoff is one 16 KiB chunk: from ready() and finish() to the receipt, with the reservation made before.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import (
    FirstToken,
    Inbound,
    KvEndpoint,
    Outbound,
    PageLayout,
    Receipt,
    Transfer,
    TransferConfig,
    TransferMetrics,
)
from baton_kvtransfer.config import WireChoice
from baton_proto.common_pb2 import Compat
from bench.ceilings import memmove_gbps
from bench.report import Report, Row

LAYOUT = PageLayout(layers=8, kv=2, heads=8, page_tokens=64, dim=128, dtype="bfloat16")  # 2 MiB a page
SMALL = PageLayout(layers=1, kv=2, heads=2, page_tokens=64, dim=32, dtype="bfloat16")  # 16 KiB a page
PAGES = 48
TRANSFER_PAGES = 32


class Ignore:
    def on_receiving(self, transfer_id: TransferId) -> None: ...
    def on_received(self, transfer_id: TransferId, first: FirstToken, receipt: Receipt) -> None: ...
    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None: ...


def endpoint(name: str, wire: WireChoice, layout: PageLayout) -> KvEndpoint:
    pool = torch.ones(layout.shape(PAGES), dtype=torch.bfloat16)
    return KvEndpoint(
        worker_id=name, incarnation=f"{name}-1", compat=Compat(), pool=pool, layout=layout,
        config=TransferConfig(wire=wire), clock=SystemClock(), events=Ignore(),
        metrics=TransferMetrics(CollectorRegistry()),
    )  # fmt: skip


def receive(pipe: Connection, wire: WireChoice, small: bool) -> None:
    """The other process: expects whatever it is told to."""
    torch.set_num_threads(1)
    layout = SMALL if small else LAYOUT
    receiver = endpoint("d", wire, layout)
    pipe.send(receiver.start())
    while (order := pipe.recv()) is not None:
        name, pages = order
        table = [PageId(page) for page in reversed(range(pages))]
        receiver.expect(
            Inbound(
                transfer_id=TransferId(name), request_id=RequestId("r"), pages=table, first_token=0,
                end_token=pages * layout.page_tokens, deadline_s=1e12,
            )
        )  # fmt: skip
        pipe.send(None)
    receiver.close()


class Handoffs:
    """Makes transfers one after the other and waits for each."""

    def __init__(self, wire: WireChoice, *, small: bool) -> None:
        self.layout = SMALL if small else LAYOUT
        self.pages = 1 if small else TRANSFER_PAGES
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(theirs, wire, small), daemon=True)
        self._process.start()
        self._address: str = self._pipe.recv()
        self._sender = endpoint("p", wire, self.layout)
        self._done = threading.Event()
        self._outcome: Receipt | BatonError | None = None
        self._number = 0

    def _ended(self, outcome: Receipt | BatonError) -> None:
        self._outcome = outcome
        self._done.set()

    def open(self) -> Transfer:
        self._number += 1
        name = TransferId(str(self._number))
        self._pipe.send((name, self.pages))
        self._pipe.recv()
        self._done.clear()
        return self._sender.open(
            Outbound(
                transfer_id=name, request_id=RequestId("r"), peer_address=self._address, peer_incarnation="d-1",
                pages=[PageId(page) for page in range(self.pages)], first_token=0,
                end_token=self.pages * self.layout.page_tokens, deadline_s=1e12, done=self._ended,
            )
        )  # fmt: skip

    def run(self, transfer: Transfer) -> Receipt:
        transfer.ready(0, self.layout.layers, 0, self.pages * self.layout.page_tokens)
        transfer.finish(FirstToken(token_id=1, position=0))
        assert self._done.wait(30)
        if not isinstance(self._outcome, Receipt):
            raise SystemExit(f"handoff failed: {self._outcome!r}")
        return self._outcome

    def close(self) -> None:
        self._pipe.send(None)
        self._sender.close()
        self._process.join(10)


def repeat(seconds: float, once: Callable[[], float]) -> list[float]:
    end_s = time.perf_counter() + seconds
    values = [once()]
    while time.perf_counter() < end_s:
        values.append(once())
    return values


def throughput(report: Report, wire: WireChoice, seconds: float, goal: float | None = None) -> None:
    handoffs = Handoffs(wire, small=False)

    def once() -> float:
        transfer = handoffs.open()
        begin_s = time.perf_counter()
        receipt = handoffs.run(transfer)
        return receipt.bytes / (time.perf_counter() - begin_s) / 1e9

    once()
    before = memmove_gbps()
    value = statistics.median(repeat(seconds, once))
    ceiling = (before + memmove_gbps()) / 2
    handoffs.close()
    name = f"{wire}, 64 MiB, xxh3"
    report.add(Row(name=name, value=value, unit="GB/s", ceiling=ceiling, ceiling_name="memmove", goal=goal))


def small(report: Report, wire: WireChoice, seconds: float) -> None:
    handoffs = Handoffs(wire, small=True)

    def once() -> float:
        transfer = handoffs.open()
        time.sleep(0.002)  # the reservation is granted meanwhile
        begin_s = time.perf_counter()
        handoffs.run(transfer)
        return (time.perf_counter() - begin_s) * 1e6

    for _ in range(20):
        once()
    values = sorted(repeat(seconds, once))
    handoffs.close()
    for name, value, goal in (("p50", values[len(values) // 2], 50.0), ("p99", values[int(len(values) * 0.99)], 500.0)):
        report.add(Row(name=f"{wire}, 16 KiB {name}", value=value, unit="us", goal=goal, lower_is_better=True))


def main() -> None:
    torch.set_num_threads(1)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    report = Report(title="KV handoff", settings={"seconds_per_row": seconds})
    throughput(report, "shm", seconds, goal=0.65)
    small(report, "shm", seconds)
    throughput(report, "tcp", seconds)
    small(report, "tcp", seconds)
    report.show()


if __name__ == "__main__":
    main()
