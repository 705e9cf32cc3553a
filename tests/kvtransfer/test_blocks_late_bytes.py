"""Bytes that can be seen only after their header: a one-sided write, done for its sender, on its way into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.kv_world import LAYOUT, World

from baton_common.ids import PageId
from baton_kvtransfer import Receipt
from baton_kvtransfer.blocks import HostBlocks, Seal
from baton_kvtransfer.plan import Block
from baton_kvtransfer.wires.inproc import InprocWire
from baton_kvtransfer.wires.oneside.wire import OnesideWire


class OnTheirWay(HostBlocks):
    """Of the sender: the first chunk is digested as it is, and cannot be seen in its slot."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__(pool, LAYOUT)
        self.unseen: list[tuple[memoryview, bytes]] | None = []

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        digest = super().gather(block, pages, out, seal)
        if self.unseen == []:
            self.unseen.append((out, bytes(out)))
            out[:] = bytes(out.nbytes)
        return digest

    def come_to_light(self) -> None:
        for view, content in self.unseen or ():
            view[:] = content
        self.unseen = None


class Unlucky(HostBlocks):
    """Of the receiver: the bytes come to light between the copy and the digest."""

    def __init__(self, pool: torch.Tensor, sender: list[OnTheirWay]) -> None:
        super().__init__(pool, LAYOUT)
        self._sender = sender

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        self._rows.write(block, pages, payload)
        self._sender[0].come_to_light()
        return seal.over(payload) == digest


def test_a_chunk_whose_header_came_first_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnesideWire.caps.header_first
    monkeypatch.setattr(InprocWire, "caps", replace(InprocWire.caps, header_first=True))
    sender: list[OnTheirWay] = []

    def on_their_way(pool: torch.Tensor) -> OnTheirWay:
        sender.append(OnTheirWay(pool))
        return sender[0]

    world = World("inproc", sender_blocks=on_their_way, receiver_blocks=lambda pool: Unlucky(pool, sender))
    run = world.send(0, 40)
    receipt = run.received.wait()
    assert isinstance(receipt, Receipt)
    assert receipt.resends >= 1  # what comes to light in a slot that is in use again spoils that chunk, too
    world.check_arrived(run)
    world.close()
