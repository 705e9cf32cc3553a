"""Bytes between pool pages and payloads."""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from baton_common.ids import PageId
from baton_kvtransfer import AxisOrder, PageLayout
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, HostBlocks, Seal, seal_of
from baton_kvtransfer.plan import Block
from baton_kvtransfer.rows import PoolRows
from baton_proto.peer_pb2 import Chunk, Slot

LAYOUT = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=16, dtype="bfloat16")
BLOCK = Block(layer_begin=1, layer_end=3, head_begin=0, head_end=2, token_begin=5, token_end=40)
PAGES = [PageId(page) for page in (6, 0, 3)]
SEAL = Seal(XXH3, 7)


def pool_of(layout: PageLayout, pages: int) -> torch.Tensor:
    """In logical axis order, strided as the layout says."""
    dtype = getattr(torch, layout.dtype)
    flat = torch.randint(-100, 100, (layout.page_bytes * pages,), dtype=torch.int8).to(dtype)
    return torch.as_strided(flat, layout.shape(pages), layout.strides(pages))


def test_the_payload_is_layer_kv_head_token_dim() -> None:
    pool = pool_of(LAYOUT, 8)
    out = bytearray(BLOCK.bytes(LAYOUT))
    HostBlocks(pool, LAYOUT).gather(BLOCK, PAGES, memoryview(out), SEAL)
    payload = torch.frombuffer(out, dtype=torch.bfloat16).view(BLOCK.shape(LAYOUT))
    for position in range(5, 40):
        expected = pool[PAGES[position // 16], 1:3, :, :, position % 16]
        assert torch.equal(payload[:, :, :, position - 5], expected)


def test_what_was_gathered_is_scattered_only_under_its_digest() -> None:
    pool, payload = pool_of(LAYOUT, 8), memoryview(bytearray(BLOCK.bytes(LAYOUT)))
    digest = HostBlocks(pool, LAYOUT).gather(BLOCK, PAGES, payload, SEAL)
    target = torch.zeros_like(pool)
    blocks = HostBlocks(target, LAYOUT)
    payload[100] ^= 4
    assert not blocks.scatter(BLOCK, PAGES, payload, SEAL, digest=digest, shared=False)
    assert not bool(target.any()), "damaged bytes stay out of the pages"
    payload[100] ^= 4
    assert not blocks.scatter(BLOCK, PAGES, payload, Seal(XXH3, 8), digest=digest, shared=False)
    assert blocks.scatter(BLOCK, PAGES, payload, SEAL, digest=digest, shared=True)
    assert bool(target.any())


def test_what_changes_while_it_is_copied_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late write into memory that the peer can reach; nobody else can write into memory of our own."""
    pool, payload = pool_of(LAYOUT, 8), memoryview(bytearray(BLOCK.bytes(LAYOUT)))
    blocks = HostBlocks(pool, LAYOUT)
    digest = blocks.gather(BLOCK, PAGES, payload, SEAL)

    write = PoolRows.write

    def late(rows: PoolRows, *arguments: Any) -> None:
        payload[0] ^= 1
        write(rows, *arguments)

    monkeypatch.setattr(PoolRows, "write", late)
    assert not blocks.scatter(BLOCK, PAGES, payload, SEAL, digest=digest, shared=True)


@given(
    order=st.sampled_from(AxisOrder),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    tokens=st.tuples(st.integers(0, 30), st.integers(1, 18)),
    heads=st.sampled_from([(0, 3), (0, 1), (1, 3)]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_block_crosses_between_any_page_sizes(
    order: AxisOrder, dtype: str, tokens: tuple[int, int], heads: tuple[int, int], sizes: tuple[int, int], seed: int
) -> None:
    ours = PageLayout(layers=3, kv=2, heads=3, page_tokens=sizes[0], dim=4, dtype=dtype)
    theirs = PageLayout(layers=3, kv=2, heads=3, page_tokens=sizes[1], dim=4, dtype=dtype, order=order)
    first, end = tokens[0], sum(tokens)
    block = Block(layer_begin=1, layer_end=3, head_begin=heads[0], head_end=heads[1], token_begin=first, token_end=end)
    pages = [[PageId(page) for page in Random(seed).sample(range(64), -(-end // size))] for size in sizes]
    source, target = pool_of(ours, 64), torch.zeros_like(pool_of(theirs, 64))
    payload = memoryview(bytearray(block.bytes(ours)))
    digest = HostBlocks(source, ours).gather(block, pages[0], payload, SEAL)
    assert HostBlocks(target, theirs).scatter(block, pages[1], payload, SEAL, digest=digest, shared=False)
    for position in range(first, end):
        sent = source[pages[0][position // sizes[0]], 1:3, :, heads[0] : heads[1], position % sizes[0]]
        got = target[pages[1][position // sizes[1]], 1:3, :, heads[0] : heads[1], position % sizes[1]]
        assert torch.equal(sent, got)
        target[pages[1][position // sizes[1]], 1:3, :, heads[0] : heads[1], position % sizes[1]] = 0
    assert not bool(target.any()), "wrote outside the block"


def test_a_pool_that_is_not_of_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="the layout says bfloat16"):
        HostBlocks(torch.zeros(LAYOUT.shape(2), dtype=torch.float32), LAYOUT)


def test_a_pool_that_is_not_in_host_memory_needs_blocks_of_its_owner() -> None:
    pool = torch.zeros(LAYOUT.shape(2), dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="its owner must bring"):
        HostBlocks(pool, LAYOUT)


# ---- seals ----------------------------------------------------------------------------------------------------------
CHUNK = Chunk(transfer_id="t", sequence=3, layer_end=1, head_end=2, slot=Slot(index=1, generation=9), bytes=64)


@given(bit=st.integers(0, 64 * 8 - 1))
@settings(max_examples=50, deadline=None)
def test_a_flipped_bit_changes_the_digest(bit: int) -> None:
    payload = bytearray(range(64))
    seal = seal_of(CHUNK, XXH3)
    before = seal.over(memoryview(payload))
    payload[bit // 8] ^= 1 << (bit % 8)
    assert seal.over(memoryview(payload)) != before


@given(body=st.integers(0, 2**64 - 1), bit=st.integers(0, 63))
@settings(max_examples=50, deadline=None)
def test_another_sum_makes_another_digest(body: int, bit: int) -> None:
    seal = seal_of(CHUNK, MULTILINEAR)
    assert seal.around(body) != seal.around(body ^ 1 << bit)


@pytest.mark.parametrize(
    "change",
    [
        {"transfer_id": "u"},
        {"sequence": 4},
        {"layer_begin": 1},
        {"layer_end": 2},
        {"head_begin": 1},
        {"head_end": 3},
        {"token_begin": 1},
        {"token_end": 9},
        {"slot": Slot(index=1, generation=10)},
        {"slot": Slot(index=2, generation=9)},
        {"bytes": 65},
    ],
)
def test_the_right_bytes_under_a_wrong_header_do_not_match(change: dict[str, str | int]) -> None:
    other = Chunk()
    other.CopyFrom(CHUNK)
    other.MergeFrom(Chunk(**change))
    payload = memoryview(bytes(range(64)))
    assert seal_of(CHUNK, XXH3).over(payload) != seal_of(other, XXH3).over(payload)
    assert seal_of(CHUNK, MULTILINEAR).around(5) != seal_of(other, MULTILINEAR).around(5)


def test_digests_are_the_same_in_every_version() -> None:
    """They cross between workers: a change needs another name in `PeerHello.digests`."""
    assert seal_of(CHUNK, XXH3).over(memoryview(bytes(range(64)))) == 0x7B307DDEAFF0BAC1
    assert seal_of(CHUNK, MULTILINEAR).around(5) == 0x31D73926EB1D670A
