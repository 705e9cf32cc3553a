"""Copies blocks between pool pages and slots, and digests them. The only place that touches KV bytes.

The owner of a pool gathers from it and scatters into it; nobody else does. Pools in host memory are served here: a few
large copies per chunk, each outside the interpreter lock, through numpy: torch would start an OpenMP team in every
transfer thread, and its strided copy is slower (6.7 against 9.6 GB/s for 16 KiB runs). Whoever has a pool on another
device brings its own `Blocks`. A link uses one kind of digest, the first of the sender's list that both sides make.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from baton_common.ids import PageId
from baton_kvtransfer.layout import DTYPE_BYTES, PageLayout
from baton_kvtransfer.plan import Block, page_runs
from baton_proto.peer_pb2 import Chunk

XXH3 = "xxh3_64"
"""Over the payload, seeded with the header: as fast as memory on a host, a serial recurrence to a GPU."""
MULTILINEAR = "multilinear_64"
"""A sum over all words, weighted by position: made by a GPU in the pass that copies; the header is hashed around it."""

_TORCH_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_HEADER = struct.Struct("<8IQQ")
_BODY = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Seal:
    """One chunk's header, for its digest: bytes that land under a wrong header must not match either."""

    kind: str  # of digest, agreed for the link
    header: int  # 64 bits that stand for every other field

    def over(self, payload: memoryview) -> int:
        """XXH3: the digest of a payload in host memory."""
        return xxhash.xxh3_64_intdigest(payload, self.header)

    def around(self, body: int) -> int:
        """MULTILINEAR: the digest of a payload whose weighted sum is `body`."""
        return xxhash.xxh3_64_intdigest(_BODY.pack(body), self.header)


def seal_of(chunk: Chunk, kind: str) -> Seal:
    header = _HEADER.pack(
        chunk.sequence,
        chunk.layer_begin,
        chunk.layer_end,
        chunk.head_begin,
        chunk.head_end,
        chunk.token_begin,
        chunk.token_end,
        chunk.slot.index,
        chunk.slot.generation,
        chunk.bytes,
    )
    return Seal(kind, xxhash.xxh3_64_intdigest(header + chunk.transfer_id.encode()))


class Blocks(Protocol):
    """Copies between one pool and payloads. `pages`: the sequence's page table.

    Both calls may come from several threads at once and block until copied.
    """

    @property
    def digests(self) -> Sequence[str]:
        """Kinds that it makes, preferred first."""

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        """Fill `out`; what the pages hold is complete. Returns the digest."""

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        """True: the block's cells hold bytes of this digest. False: the bytes are damaged, and so may the cells be.

        shared: the peer can write into `payload` at any time, also while it is read.
        """


class HostBlocks:
    """Of a pool in host memory."""

    digests = (XXH3,)

    def __init__(self, pool: Tensor, layout: PageLayout) -> None:
        """`pool` in logical axis order. ValueError when it is elsewhere, or not of the layout's shape or dtype."""
        if pool.device.type != "cpu":
            raise ValueError(f"the pool is on {pool.device}: its owner must bring the blocks that copy there")
        if tuple(pool.shape[1:]) != layout.page_shape or pool.dtype != getattr(torch, layout.dtype):
            raise ValueError(
                f"pool is {pool.dtype} {tuple(pool.shape)}, the layout says {layout.dtype} {layout.page_shape}"
            )
        self._layout = layout
        self._pool: npt.NDArray[np.generic] = pool.view(_TORCH_WORD[DTYPE_BYTES[layout.dtype]]).numpy()

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        payload = self._payload(block, out)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._layout.page_tokens):
            source = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            np.copyto(payload[:, :, :, run.begin : run.begin + run.count], source)
        return seal.over(out)

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        if seal.over(payload) != digest:
            return False
        source = self._payload(block, payload)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._layout.page_tokens):
            target = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            np.copyto(target, source[:, :, :, run.begin : run.begin + run.count])
        # a late write may have come between the digest and the copy; then the pages hold it, but nothing is committed
        return not shared or seal.over(payload) == digest

    def _payload(self, block: Block, view: memoryview) -> npt.NDArray[np.generic]:
        return np.frombuffer(view, dtype=self._pool.dtype).reshape(block.shape(self._layout))
