"""One worker's half of a handoff under measurement: a pool and an endpoint, alone in its process."""

from __future__ import annotations

import threading
import time
from typing import cast

import numpy as np
import torch
import xxhash
from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import RequestId, TransferId
from baton_kvtransfer import (
    FirstToken,
    Inbound,
    KvEndpoint,
    Outbound,
    Receipt,
    Transfer,
    TransferConfig,
    TransferMetrics,
)
from baton_kvtransfer.blocks import Blocks, HostBlocks
from baton_kvtransfer.config import WireChoice
from baton_kvtransfer.records import PullOrder
from baton_proto.common_pb2 import Compat
from bench.kvtransfer.shapes import Shape
from bench.kvtransfer.undigested import UndigestedBlocks

NEVER_S = 1e12
LIMIT_S = 30.0


class Heard:
    """What the owner of one transfer was told, and when (seconds of the machine's monotonic clock)."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.outcome: Receipt | BatonError | None = None
        self.at_s = 0.0

    def set(self, outcome: Receipt | BatonError) -> None:
        self.at_s = time.monotonic()
        self.outcome = outcome
        self._event.set()

    def wait(self) -> tuple[str, float]:
        """Kind of the outcome, and when."""
        if not self._event.wait(LIMIT_S):
            raise RuntimeError("the transfer did not end")
        return type(self.outcome).__name__, self.at_s


class Node:
    """`digest`: False = the pair agrees on none. `seed`: of the pool's bytes and of its page table; 0 = zeros."""

    def __init__(self, name: str, wire: str, shape: Shape, digest: bool, seed: int) -> None:
        self._shape = shape
        self._pool, own_blocks = self._memory(shape, seed)
        self._table = shape.table(seed=seed + 1)
        self._heard: dict[str, Heard] = {}
        self._transfers: dict[str, Transfer] = {}
        blocks = own_blocks or (HostBlocks if digest else UndigestedBlocks)(self._pool, shape.layout)
        self._endpoint = KvEndpoint(
            worker_id=name, incarnation=f"{name}-1", compat=Compat(), pool=self._pool, layout=shape.layout,
            config=TransferConfig(wire=cast(WireChoice, wire)), clock=SystemClock(), events=self,
            metrics=TransferMetrics(CollectorRegistry()), blocks=blocks,
        )  # fmt: skip
        self._address = self._endpoint.start()

    def _memory(self, shape: Shape, seed: int) -> tuple[torch.Tensor, Blocks | None]:
        """The pool; and its blocks, where it is not in host memory."""
        return shape.pool(seed=seed), None

    def address(self) -> str:
        return self._address

    # ---- events -------------------------------------------------------------------------------------------------
    def on_pull(self, order: PullOrder) -> None: ...

    def on_receiving(self, transfer_id: TransferId) -> None: ...

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        self._heard[transfer_id].set(receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        self._heard[transfer_id].set(error)

    # ---- orders -------------------------------------------------------------------------------------------------
    def expect(self, name: str, pages: int) -> None:
        self._heard = {name: Heard(), **dict(list(self._heard.items())[-8:])}
        self._endpoint.expect(
            Inbound(
                transfer_id=TransferId(name), request_id=RequestId("r"), pages=self._table[:pages], first_token=0,
                end_token=pages * self._shape.layout.page_tokens, deadline_s=NEVER_S,
            )
        )  # fmt: skip

    def open(self, name: str, pages: int, address: str, incarnation: str) -> None:
        heard = Heard()
        self._heard = {name: heard}
        self._transfers = {
            name: self._endpoint.open(
                Outbound(
                    transfer_id=TransferId(name), request_id=RequestId("r"), peer_address=address,
                    peer_incarnation=incarnation, pages=self._table[:pages], first_token=0,
                    end_token=pages * self._shape.layout.page_tokens, deadline_s=NEVER_S, done=heard.set,
                )
            )
        }  # fmt: skip

    def ready(self, name: str, layers: int, tokens: int) -> float:
        """Returns when."""
        begin_s = time.monotonic()
        self._transfers[name].ready(0, layers, 0, tokens)
        return begin_s

    def finish(self, name: str) -> None:
        self._transfers[name].finish(FirstToken(token_id=1, position=0))

    def send(self, name: str, pages: int) -> tuple[float, float]:
        """Everything at once; when it began, and when the receipt came. Raises when there is none."""
        layout = self._shape.layout
        begin_s = self.ready(name, layout.layers, pages * layout.page_tokens)
        self.finish(name)
        kind, end_s = self._heard[name].wait()
        if kind != "Receipt":
            raise RuntimeError(f"handoff failed: {self._heard[name].outcome!r}")
        return begin_s, end_s

    def send_by_layers(self, name: str, pages: int, pause_s: float) -> float:
        """As a prefill does it: one layer after the other. Seconds from the end of the last to the receipt."""
        layout = self._shape.layout
        for layer in range(layout.layers):
            time.sleep(pause_s)
            self._transfers[name].ready(layer, layer + 1, 0, pages * layout.page_tokens)
        finished_s = time.monotonic()
        self.finish(name)
        kind, end_s = self._heard[name].wait()
        if kind != "Receipt":
            raise RuntimeError(f"handoff failed: {self._heard[name].outcome!r}")
        return end_s - finished_s

    def wait(self, name: str) -> tuple[str, float]:
        return self._heard[name].wait()

    def moved_bytes(self) -> int:
        return sum(peer.bytes for peer in self._endpoint.peers())

    def content(self) -> int:
        """A digest of all pages in the order of the table: equal on both sides when all arrived right."""
        words = self._pool.cpu().view(torch.int16)
        state = xxhash.xxh3_64()
        for page in self._table:
            state.update(np.ascontiguousarray(words[page].numpy()).data)
        return state.intdigest()

    def close(self) -> None:
        self._endpoint.close()
