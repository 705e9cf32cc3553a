"""A KV receiver or sender in a process of its own, driven by JSON over a pipe. Runs in a forked server of the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from support.kv_world import LAYOUT, Outcome, Side, setting

from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import FirstToken, Inbound, Outbound, Receipt, Transfer, TransferConfig


class Peer:
    """Answers each order with a line, and says how each transfer it sends ended."""

    def __init__(self, pipe: Connection, name: str, incarnation: str, wire: str, **settings: Any) -> None:
        config = TransferConfig(wire=setting(wire), slot_bytes=4096, slots_per_peer=2, **settings)
        self._pipe = pipe
        self._transfers: dict[str, Transfer] = {}
        self._side = Side(name, config=config, incarnation=incarnation)
        self.say(address=self._side.address)

    def say(self, **fields: object) -> None:
        self._pipe.send_bytes(json.dumps(fields).encode())

    def run(self) -> None:
        while True:
            order = json.loads(self._pipe.recv_bytes())
            pages = [PageId(page) for page in order.get("pages", ())]
            match order["do"]:
                case "expect":
                    self.expect(TransferId(order["id"]), pages, order["tokens"])
                case "send":
                    self.send(order, pages)
                case "fill":
                    self._side.pool.fill_(order["value"])
                    self.say(filled=order["value"])
                case "abort":
                    self._transfers[order["id"]].abort(BatonError("changed my mind"))
                case "cancel":
                    self._side.endpoint.cancel(TransferId(order["id"]), BatonError("changed my mind"))
                case "look":
                    outcome = self._side.inbound[TransferId(order["id"])]
                    kind = "" if outcome.value is None else type(outcome.value).__name__
                    self.say(receiving=outcome.receiving, kind=kind)
                case unknown:
                    raise ValueError(unknown)

    def expect(self, transfer_id: TransferId, pages: list[PageId], tokens: int) -> None:
        self._side.inbound[transfer_id] = Outcome()
        self._side.endpoint.expect(
            Inbound(
                transfer_id=transfer_id,
                request_id=RequestId("r"),
                pages=pages,
                first_token=0,
                end_token=tokens,
                deadline_s=1e12,
            )
        )
        self.say(expected=transfer_id)

    def send(self, order: dict[str, Any], pages: list[PageId]) -> None:
        tokens = order["tokens"]
        transfer = self._transfers[order["id"]] = self._side.endpoint.open(
            Outbound(
                transfer_id=TransferId(order["id"]),
                request_id=RequestId("r"),
                peer_address=order["address"],
                peer_incarnation=order["incarnation"],
                pages=pages,
                first_token=0,
                end_token=tokens,
                deadline_s=1e12,
                done=lambda outcome: self.say(ended=type(outcome).__name__, ok=isinstance(outcome, Receipt)),
            )
        )
        self.say(sending=order["id"])
        transfer.ready(0, LAYOUT.layers if order["all"] else LAYOUT.layers - 1, 0, tokens)
        if order["all"]:
            transfer.finish(FirstToken(token_id=tokens, position=0))


def serve(pipe: Connection, name: str, incarnation: str, wire: str, settings: Mapping[str, Any] | None = None) -> None:
    """`settings`: more of the TransferConfig."""
    torch.set_num_threads(1)
    Peer(pipe, name, incarnation, wire, **(settings or {})).run()
