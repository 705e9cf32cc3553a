"""One rank in a process of its own: a pool of its heads alone, an endpoint, and its part of each handoff.

Driven by JSON over a pipe; runs in a forked server of the tests. The pool is a file that the tests map, too: they write
and read the KV of this rank as its kernels would, and tell it what is ready.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from support.kv_world import setting

from baton_common.clock import SystemClock
from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import (
    Fence,
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
from baton_kvtransfer.handoff import Handoff
from baton_proto.common_pb2 import Compat

SLOTS = 3
SLOT_BYTES = 4096  # so that a prompt takes many chunks
FAR_S = 1e12


def mapped(path: Path, layout: PageLayout, pages: int) -> torch.Tensor:
    """The pool in that file, in logical axis order; whoever maps it sees the same bytes. Made when it is missing."""
    dtype = getattr(torch, layout.dtype)
    flat = torch.from_file(str(path), shared=True, size=pages * layout.page_bytes // dtype.itemsize, dtype=dtype)
    return flat.as_strided(layout.shape(pages), layout.strides(pages))


class Part:
    """What this rank does for one handoff."""

    def __init__(self) -> None:
        self.handoff: Handoff
        self.transfers: dict[TransferId, Transfer] = {}
        self.receiving: set[TransferId] = set()
        self.first: set[int] = set()  # ids of token #1, as the routes brought it
        self.fence: Fence | None = None  # of the abort


class Rank:
    """Answers orders with a line, and says once how each handoff ended."""

    def __init__(
        self, pipe: Connection, name: str, incarnation: str, wire: str, *, layout: PageLayout, compat: bytes,
        pool: torch.Tensor,
    ) -> None:  # fmt: skip
        self._pipe, self._speaking, self._opening = pipe, threading.Lock(), threading.Lock()
        self._registry = CollectorRegistry()
        self._parts: dict[str, Part] = {}
        self._part_of: dict[TransferId, Part] = {}
        self._endpoint = KvEndpoint(
            worker_id=name,
            incarnation=incarnation,
            compat=Compat.FromString(compat),
            pool=pool,
            layout=layout,
            config=TransferConfig(  # a machine that stands still for seconds is no dead peer
                wire=setting(wire), slot_bytes=SLOT_BYTES, slots_per_peer=SLOTS, connect_timeout_s=30,
                alive_interval_s=10, answer_timeout_s=30,
            ),
            clock=SystemClock(),
            events=self,
            metrics=TransferMetrics(self._registry),
        )  # fmt: skip
        self.say(address=self._endpoint.start())

    def say(self, **fields: object) -> None:
        with self._speaking:
            self._pipe.send_bytes(json.dumps(fields).encode())

    def run(self) -> None:
        while True:
            order = json.loads(self._pipe.recv_bytes())
            name = order.get("handoff", "")
            match order["do"]:
                case "expect" | "open":
                    self.take(order, name)
                    self.say(took=name)
                case "ready":
                    for transfer in self._parts[name].transfers.values():
                        transfer.ready(*order["layers"], *order["tokens"])
                case "finish":
                    for transfer in self._parts[name].transfers.values():
                        transfer.finish(FirstToken(token_id=order["token"], position=0))
                case "abort":
                    why = BatonError("another rank failed", kind=ErrorKind.ABORTED)
                    self._parts[name].fence = self._parts[name].handoff.abort(why)
                    self.say(aborted=name)
                case "look":
                    self.say(**self.look(self._parts[name]))
                case unknown:
                    raise ValueError(unknown)

    def take(self, order: dict[str, Any], name: str) -> None:
        """Its routes of a handoff; none of them may end before all of them are there."""
        part = self._parts[name] = Part()
        begin = self.expect if order["do"] == "expect" else self.open
        routes = {TransferId(route["id"]): route for route in order["routes"]}
        abort = self._endpoint.cancel if order["do"] == "expect" else lambda of, why: part.transfers[of].abort(why)
        part.handoff = Handoff(routes, abort, partial(self.over, name, part))
        with self._opening:
            for transfer_id, route in routes.items():
                self._part_of[transfer_id] = part
                begin(transfer_id, route, [PageId(page) for page in order["pages"]])

    def expect(self, transfer_id: TransferId, route: dict[str, Any], pages: Sequence[PageId]) -> None:
        first, end = route["tokens"]
        self._endpoint.expect(
            Inbound(
                transfer_id=transfer_id, request_id=RequestId("r"), pages=pages, first_token=first, end_token=end,
                deadline_s=FAR_S, heads=(route["heads"][0], route["heads"][1]),
            )
        )  # fmt: skip

    def open(self, transfer_id: TransferId, route: dict[str, Any], pages: Sequence[PageId]) -> None:
        first, end = route["tokens"]
        self._part_of[transfer_id].transfers[transfer_id] = self._endpoint.open(
            Outbound(
                transfer_id=transfer_id, request_id=RequestId("r"), peer_address=route["address"],
                peer_incarnation=route["incarnation"], pages=pages, first_token=first, end_token=end, deadline_s=FAR_S,
                heads=(route["heads"][0], route["heads"][1]), done=partial(self.ended, transfer_id),
            )
        )  # fmt: skip

    def look(self, part: Part) -> dict[str, object]:
        def sample(name: str) -> float:
            return self._registry.get_sample_value(f"baton_kvtransfer_{name}", {"direction": "out"}) or 0

        in_hand = self._registry.get_sample_value("baton_kvtransfer_free_slots") or 0
        return {
            "receiving": len(part.receiving),
            "in_flight": sum(peer.transfers for peer in self._endpoint.peers()),
            "expected": len(self._endpoint._expected),
            "slots_away": sample("links") * SLOTS - in_hand,
            "fence": part.fence is None or part.fence.done(),
        }

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def ended(self, transfer_id: TransferId, outcome: Receipt | BatonError) -> None:
        with self._opening:
            part = self._part_of[transfer_id]
        part.handoff.ended(transfer_id, outcome)

    def over(self, name: str, part: Part, outcome: Sequence[Receipt] | BatonError) -> None:
        if isinstance(outcome, BatonError):
            self.say(over=name, error=type(outcome).__name__)
        else:
            wires, size = sorted({receipt.wire for receipt in outcome}), sum(receipt.bytes for receipt in outcome)
            self.say(over=name, error="", wires=wires, bytes=size, routes=len(outcome), first=sorted(part.first))

    def on_pull(self, order: PullOrder) -> None:
        raise AssertionError("nobody pulls here")

    def on_receiving(self, transfer_id: TransferId) -> None:
        self._part_of[transfer_id].receiving.add(transfer_id)

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        assert first is not None, "token #1 comes with every route"
        self._part_of[transfer_id].first.add(first.token_id)
        self.ended(transfer_id, receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        self.ended(transfer_id, error)


def serve(
    pipe: Connection, name: str, incarnation: str, wire: str, layout: PageLayout, compat: bytes, path: str, pages: int
) -> None:
    torch.set_num_threads(1)
    pool = mapped(Path(path), layout, pages)
    Rank(pipe, name, incarnation, wire, layout=layout, compat=compat, pool=pool).run()
