"""Two KV endpoints in one process, on any wire, with or without faults; and transfers whose bytes are checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import cast

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
    PullOrder,
    Receipt,
    Transfer,
    TransferConfig,
    TransferMetrics,
)
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.config import WireChoice
from baton_kvtransfer.transport import SocketTransport, Transport
from baton_kvtransfer.wires.chaos import ChaosTransport, Faults
from baton_kvtransfer.wires.inproc import Hub, InprocTransport
from baton_proto.common_pb2 import Compat

LAYOUT = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=16, dtype="bfloat16")
COMPAT = Compat(
    protocol_version=1, model_digest="m", kv_dtype="bfloat16", page_tokens=16, layers=4, kv_heads=2, head_dim=16
)
PAGES = 96
CANARY = 99.0
LIMIT_S = 15.0
"""Only bounds a failing test."""

MakeBlocks = Callable[[torch.Tensor], Blocks]
"""Of a pool; for pools that are not in host memory."""


def setting(wire: str) -> WireChoice:
    """That makes two endpoints of one machine take this wire."""
    return "auto" if wire in ("inproc", "shm") else cast(WireChoice, wire)


def eventually(fact: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end_s = time.monotonic() + limit_s
    while not fact():
        assert time.monotonic() < end_s, f"never came true: {what}"
        time.sleep(0.002)


@dataclass(slots=True)
class Outcome:
    """What an owner hears about one transfer."""

    event: threading.Event = field(default_factory=threading.Event)
    value: Receipt | BatonError | None = None
    first: FirstToken | None = None
    receiving: int = 0
    count: int = 0
    at_s: float = 0.0

    def set(self, value: Receipt | BatonError) -> None:
        self.value, self.count, self.at_s = value, self.count + 1, time.monotonic()
        self.event.set()

    def wait(self, limit_s: float = LIMIT_S) -> Receipt | BatonError:
        assert self.event.wait(limit_s), "the owner never heard"
        assert self.value is not None
        return self.value


class Side:
    """One worker: pool, endpoint, and what its owner heard."""

    def __init__(
        self,
        name: str,
        *,
        config: TransferConfig,
        transport: Transport | None = None,
        compat: Compat = COMPAT,
        incarnation: str = "",
        blocks: MakeBlocks | None = None,
    ) -> None:
        self.name = name
        self.incarnation = incarnation or f"{name}-1"
        self.pool = torch.full(LAYOUT.shape(PAGES), CANARY, dtype=torch.bfloat16)
        self.free = [PageId(page) for page in range(PAGES)]
        self.registry = CollectorRegistry()
        self.inbound: dict[TransferId, Outcome] = {}
        self.pulls: list[PullOrder] = []
        self.lend: Callable[[PullOrder], None] = lambda _order: None
        self.endpoint = KvEndpoint(
            worker_id=name,
            incarnation=self.incarnation,
            compat=compat,
            pool=self.pool,
            layout=LAYOUT,
            config=config,
            clock=SystemClock(),
            events=self,
            metrics=TransferMetrics(self.registry),
            blocks=blocks(self.pool) if blocks else None,
            transport=transport,
        )
        self.address = self.endpoint.start()

    def on_pull(self, order: PullOrder) -> None:
        self.pulls.append(order)
        self.lend(order)

    def on_receiving(self, transfer_id: TransferId) -> None:
        self.inbound[transfer_id].receiving += 1

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        self.inbound[transfer_id].first = first
        self.inbound[transfer_id].set(receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        self.inbound[transfer_id].set(error)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"baton_kvtransfer_{name}", labels) or 0.0


@dataclass(slots=True, kw_only=True)
class Run:
    """One transfer under test."""

    transfer_id: TransferId
    first_token: int
    end_token: int
    sender_pages: list[PageId]
    receiver_pages: list[PageId]
    wanted: torch.Tensor
    handle: Transfer
    sent: Outcome
    received: Outcome

    def announce(self, layers_at_once: int = 1, tokens_at_once: int = 0) -> None:
        step = tokens_at_once or max(1, self.end_token)
        for begin in range(0, self.end_token, step):
            for layer in range(0, LAYOUT.layers, layers_at_once):
                self.handle.ready(layer, min(layer + layers_at_once, LAYOUT.layers), begin, begin + step)

    def finish(self) -> None:
        self.handle.finish(FirstToken(token_id=self.end_token, position=0, logprob=-0.5, top=((3, -0.5),)))


class World:
    def __init__(
        self,
        wire: str,
        *,
        faults: Faults | None = None,
        sender_config: TransferConfig | None = None,
        receiver_config: TransferConfig | None = None,
        sender_blocks: MakeBlocks | None = None,
        receiver_blocks: MakeBlocks | None = None,
        seed: int = 0,
    ) -> None:
        self.random = Random(seed)
        self.hub = Hub()
        self.faults = faults
        self.wire = wire
        base = TransferConfig(wire=setting(wire), slot_bytes=4096, slots_per_peer=4)
        self.config = receiver_config or base
        self.sender = self.side("p", sender_config or base, blocks=sender_blocks)
        self.receiver = self.side("d", self.config, blocks=receiver_blocks)
        self._numbers = 0

    def side(
        self,
        name: str,
        config: TransferConfig,
        compat: Compat = COMPAT,
        incarnation: str = "",
        blocks: MakeBlocks | None = None,
    ) -> Side:
        inner: Transport = InprocTransport(config, self.hub) if self.wire == "inproc" else SocketTransport(config)
        transport = inner if self.faults is None else ChaosTransport(inner, self.faults)
        return Side(name, config=config, transport=transport, compat=compat, incarnation=incarnation, blocks=blocks)

    def start(
        self,
        first_token: int,
        end_token: int,
        *,
        deadline_s: float = 30.0,
        sender: Side | None = None,
        expect: bool = True,
        address: str = "",
        incarnation: str = "",
    ) -> Run:
        """Random page tables on both sides, random bytes on the sender's."""
        sender = sender or self.sender
        receiver = self.receiver
        transfer_id = self.next_id()
        self._numbers += 1
        count = -(-end_token // LAYOUT.page_tokens)
        source, target = self._take(sender, count), self._take(receiver, count)
        for page in source:
            sender.pool[page] = torch.randint(-90, 90, LAYOUT.page_shape).to(torch.bfloat16)
        due_s = time.monotonic() + deadline_s
        sent, received = Outcome(), Outcome()
        receiver.inbound[transfer_id] = received
        if expect:
            inbound = Inbound(
                transfer_id=transfer_id, request_id=RequestId("r"), pages=target, first_token=first_token,
                end_token=end_token, deadline_s=due_s,
            )  # fmt: skip
            receiver.endpoint.expect(inbound)
        outbound = Outbound(
            transfer_id=transfer_id,
            request_id=RequestId("r"),
            peer_address=address or receiver.address,
            peer_incarnation=incarnation or receiver.incarnation,
            pages=source,
            first_token=first_token,
            end_token=end_token,
            deadline_s=due_s,
            done=sent.set,
        )
        return Run(
            transfer_id=transfer_id,
            first_token=first_token,
            end_token=end_token,
            sender_pages=source,
            receiver_pages=target,
            wanted=positions(sender.pool, source, first_token, end_token),
            handle=sender.endpoint.open(outbound),
            sent=sent,
            received=received,
        )

    def next_id(self) -> TransferId:
        """Of the transfer that `start` will make."""
        return TransferId(f"{self.receiver.incarnation}-{self._numbers + 1}")

    def send(self, first_token: int, end_token: int, **how: float) -> Run:
        """Announced and finished; outcomes are still to come."""
        run = self.start(first_token, end_token, **how)  # type: ignore[arg-type]
        run.announce()
        run.finish()
        return run

    def check_arrived(self, run: Run) -> None:
        """Right bytes in the range, nothing outside it."""
        arrived = positions(self.receiver.pool, run.receiver_pages, run.first_token, run.end_token)
        assert torch.equal(arrived, run.wanted), f"{run.transfer_id}: wrong bytes"
        size = LAYOUT.page_tokens
        outside = positions(self.receiver.pool, run.receiver_pages, 0, run.first_token)
        beyond = positions(self.receiver.pool, run.receiver_pages, run.end_token, len(run.receiver_pages) * size)
        for rest in (outside, beyond):
            assert bool((rest == CANARY).all()), f"{run.transfer_id}: wrote outside its range"

    def reuse(self, run: Run) -> None:
        """The receiver's owner takes the pages back: from now on they must hold still."""
        for page in run.receiver_pages:
            self.receiver.pool[page] = CANARY
        self.receiver.free.extend(run.receiver_pages)
        self.sender.free.extend(run.sender_pages)

    def check_canaries(self) -> None:
        assert bool((self.receiver.pool[self.receiver.free] == CANARY).all()), "a freed page was written"

    def close(self) -> None:
        self.sender.endpoint.close()
        self.receiver.endpoint.close()

    def _take(self, side: Side, count: int) -> list[PageId]:
        self.random.shuffle(side.free)
        taken, side.free[:count] = side.free[:count], []
        assert len(taken) == count, "the test asks for more pages than there are"
        return taken


def positions(pool: torch.Tensor, pages: list[PageId], first: int, end: int) -> torch.Tensor:
    """[positions, layers, kv, heads, dim], a copy."""
    size = LAYOUT.page_tokens
    rows = [pool[pages[p // size], :, :, :, p % size] for p in range(first, end)]
    return torch.stack(rows) if rows else torch.empty(0)


@contextmanager
def world(wire: str, **how: object) -> Iterator[World]:
    made = World(wire, **how)  # type: ignore[arg-type]
    threads_before = threading.active_count()
    try:
        yield made
    finally:
        made.close()
        assert threading.active_count() <= threads_before, "a transfer thread outlived its endpoint"


def no_kv_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("baton-kv")]
