"""Which digest a link uses, when its two sides make different ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.kv_world import LAYOUT, MakeBlocks, World, eventually

from baton_common.ids import PageId
from baton_kvtransfer import Receipt
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, HostBlocks, Seal
from baton_kvtransfer.errors import LayoutMismatch
from baton_kvtransfer.plan import Block


class Recorded(HostBlocks):
    """Notes what it was asked for; any kind will do here, so all are computed alike."""

    def __init__(self, pool: torch.Tensor, digests: Sequence[str]) -> None:
        super().__init__(pool, LAYOUT)
        self.digests = tuple(digests)
        self.asked: set[str] = set()

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        self.asked.add(seal.kind)
        return super().gather(block, pages, out, seal)

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        self.asked.add(seal.kind)
        return super().scatter(block, pages, payload, seal, digest=digest, shared=shared)


def side(made: list[Recorded], *digests: str) -> MakeBlocks:
    def make(pool: torch.Tensor) -> Recorded:
        made.append(Recorded(pool, digests))
        return made[-1]

    return make


@pytest.mark.parametrize(
    ("sender", "receiver", "agreed"),
    [
        ((XXH3,), (XXH3,), XXH3),
        ((MULTILINEAR, XXH3), (MULTILINEAR, XXH3), MULTILINEAR),
        ((MULTILINEAR, XXH3), (XXH3,), XXH3),
        ((XXH3,), (MULTILINEAR, XXH3), XXH3),
        ((MULTILINEAR, XXH3), (XXH3, MULTILINEAR), MULTILINEAR),
    ],
)
def test_the_first_of_the_sender_that_both_make_is_used(
    sender: Sequence[str], receiver: Sequence[str], agreed: str
) -> None:
    made: list[Recorded] = []
    world = World("inproc", sender_blocks=side(made, *sender), receiver_blocks=side(made, *receiver))
    run = world.send(0, 40)
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)
    assert [blocks.asked for blocks in made] == [{agreed}, {agreed}]
    world.close()


def test_sides_without_a_common_digest_are_told_which_they_make() -> None:
    made: list[Recorded] = []
    world = World("inproc", sender_blocks=side(made, MULTILINEAR), receiver_blocks=side(made, "crc", XXH3))
    error = world.send(0, 20).sent.wait()
    assert isinstance(error, LayoutMismatch)
    assert (error.field, error.ours, error.theirs) == ("digests", MULTILINEAR, f"crc, {XXH3}")
    eventually(lambda: [peer.state for peer in world.receiver.endpoint.peers()] == ["refused"], "it is remembered")
    world.close()
