"""Two endpoints in one process, over shm or tcp through a transport that does damage; for rows that count, not time.

Every page that nobody expects anything in is full of canaries.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import (
    Fence,
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
from baton_kvtransfer.records import PullOrder
from baton_kvtransfer.transport import SocketTransport, Transport
from baton_proto.common_pb2 import Compat

LAYOUT = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=16, dtype="bfloat16")
PAGES = 256
CANARY = 99.0
SLOTS = 4
LIMIT_S = 30.0

Wrap = Callable[[Transport], Transport]


@dataclass(slots=True)
class Ending:
    event: threading.Event = field(default_factory=threading.Event)
    outcome: Receipt | BatonError | None = None

    def set(self, outcome: Receipt | BatonError) -> None:
        self.outcome = outcome
        self.event.set()

    def wait(self) -> bool:
        """True: with a receipt."""
        if not self.event.wait(LIMIT_S):
            raise RuntimeError("a transfer did not end")
        return isinstance(self.outcome, Receipt)


@dataclass(slots=True, kw_only=True)
class Run:
    name: TransferId
    tokens: int
    sources: list[PageId]
    targets: list[PageId]
    transfer: Transfer
    sent: Ending
    received: Ending


class Side:
    def __init__(self, name: str, wire: str, wrap: Wrap) -> None:
        self.pool = torch.full(LAYOUT.shape(PAGES), CANARY, dtype=torch.bfloat16)
        self.free = [PageId(page) for page in range(PAGES)]
        self.registry = CollectorRegistry()
        self.inbound: dict[TransferId, Ending] = {}
        config = TransferConfig(wire=cast(WireChoice, wire), slot_bytes=4096, slots_per_peer=SLOTS)
        self.endpoint = KvEndpoint(
            worker_id=name, incarnation=f"{name}-1", compat=Compat(), pool=self.pool, layout=LAYOUT, config=config,
            clock=SystemClock(), events=self, metrics=TransferMetrics(self.registry),
            transport=wrap(SocketTransport(config)),
        )  # fmt: skip
        self.address = self.endpoint.start()

    def on_pull(self, order: PullOrder) -> None: ...
    def on_receiving(self, transfer_id: TransferId) -> None: ...

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        self.inbound[transfer_id].set(receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        self.inbound[transfer_id].set(error)

    def metric(self, name: str) -> float:
        return self.registry.get_sample_value(f"baton_kvtransfer_{name}") or 0.0

    def in_flight(self) -> int:
        return sum(peer.transfers for peer in self.endpoint.peers())


class Twins:
    def __init__(self, wire: str, wrap: Wrap) -> None:
        self.sender, self.receiver = Side("p", wire, wrap), Side("d", wire, wrap)
        self.random = random.Random(1)
        self._count = 0

    def start(self, tokens: int) -> Run:
        """Granted or not, nothing is announced."""
        self._count += 1
        name = TransferId(str(self._count))
        pages = -(-tokens // LAYOUT.page_tokens)
        sources, targets = self._take(self.sender, pages), self._take(self.receiver, pages)
        self.sender.pool[sources] = torch.randint(-90, 90, (pages, *LAYOUT.page_shape)).to(torch.bfloat16)
        sent, received = Ending(), Ending()
        self.receiver.inbound[name] = received
        deadline_s = time.monotonic() + LIMIT_S
        self.receiver.endpoint.expect(
            Inbound(
                transfer_id=name, request_id=RequestId("r"), pages=targets, first_token=0, end_token=tokens,
                deadline_s=deadline_s,
            )
        )  # fmt: skip
        transfer = self.sender.endpoint.open(
            Outbound(
                transfer_id=name, request_id=RequestId("r"), peer_address=self.receiver.address,
                peer_incarnation="d-1", pages=sources, first_token=0, end_token=tokens, deadline_s=deadline_s,
                done=sent.set,
            )
        )  # fmt: skip
        return Run(
            name=name, tokens=tokens, sources=sources, targets=targets, transfer=transfer, sent=sent, received=received
        )

    def send(self, tokens: int) -> Run:
        run = self.start(tokens)
        run.transfer.ready(0, LAYOUT.layers, 0, tokens)
        run.transfer.finish(FirstToken(token_id=1, position=0))
        return run

    def is_right(self, run: Run) -> bool:
        """What arrived is what was sent, and what lies beyond it was left alone."""
        cells = [pool[pages].movedim(4, 1).flatten(0, 1) for pool, pages in
                 ((self.sender.pool, run.sources), (self.receiver.pool, run.targets))]  # fmt: skip
        beyond = cells[1][run.tokens :]
        return torch.equal(cells[0][: run.tokens], cells[1][: run.tokens]) and bool((beyond == CANARY).all())

    def reuse(self, run: Run) -> None:
        """The owners have their pages back: nobody may write them any more."""
        self.receiver.pool[run.targets] = CANARY
        self.receiver.free += run.targets
        self.sender.free += run.sources
        del self.receiver.inbound[run.name]

    def corrupted_pages(self) -> int:
        """Free pages that somebody wrote."""
        wrong = (self.receiver.pool[self.receiver.free] != CANARY).flatten(1).any(1)
        return int(wrong.sum())

    def close(self) -> None:
        self.sender.endpoint.close()
        self.receiver.endpoint.close()

    def _take(self, side: Side, count: int) -> list[PageId]:
        self.random.shuffle(side.free)
        taken, side.free = side.free[:count], side.free[count:]
        return taken


def wait_done(fence: Fence) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not fence.done():
        if time.monotonic() > end_s:
            raise RuntimeError("a fence is never done")
        time.sleep(0.0002)
