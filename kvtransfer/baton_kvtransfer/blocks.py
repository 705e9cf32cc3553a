"""Copies blocks between pool pages and slots, and digests them. The only place that touches KV bytes.

The owner of a pool gathers from it and scatters into it; nobody else does. Pools in host memory are served here:
`rows` copies, `convert` changes the dtype where the payloads of the link have another than the pool. Whoever has a pool
on another device brings its own `Blocks`. A link uses one kind of digest, the first of the sender's list that both
sides make, and one dtype of payloads. The digest is over the payload, so over the bytes that travel.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from baton_common.ids import PageId
from baton_kvtransfer.convert import CONVERTIBLE, Cells, convert
from baton_kvtransfer.errors import LayoutMismatch
from baton_kvtransfer.layout import DTYPE_BYTES, SCALED, PageLayout
from baton_kvtransfer.plan import Block
from baton_kvtransfer.rows import PoolRows, ignore
from baton_proto.peer_pb2 import Chunk

XXH3 = "xxh3_64"
"""Over the payload, seeded with the header: as fast as memory on a host, a serial recurrence to a GPU."""
MULTILINEAR = "multilinear_64"
"""A sum over all words, weighted by position: made by a GPU in the pass that copies; the header is hashed around it."""

_TORCH_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_HEADER = struct.Struct("<8IQQ")
_BODY = struct.Struct("<Q")


class Running(Protocol):
    """A digest that is being made."""

    def update(self, piece: memoryview, /) -> None: ...

    def intdigest(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Seal:
    """One chunk's header, for its digest: bytes that land under a wrong header must not match either."""

    kind: str  # of digest, agreed for the link
    header: int  # 64 bits that stand for every other field

    def over(self, payload: memoryview) -> int:
        """XXH3: the digest of a payload in host memory."""
        return xxhash.xxh3_64_intdigest(payload, self.header)

    def running(self) -> Running:
        """XXH3, fed piece by piece: the same digest as `over` all of them."""
        return xxhash.xxh3_64(seed=self.header)

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


def agreed_payload(*, sender: Sequence[str], receiver: Sequence[str]) -> str:
    """The dtype of a link, from the `payloads` of its sides: that of the narrower pool, so that the sender narrows and
    the receiver widens; of the receiver's where they are equally wide. Raises LayoutMismatch."""
    theirs, ours = next(iter(sender), ""), receiver[0]
    wanted = (ours, theirs) if DTYPE_BYTES[ours] <= DTYPE_BYTES.get(theirs, 0) else (theirs, ours)
    for dtype in wanted:
        if dtype in sender and dtype in receiver:
            return dtype
    raise LayoutMismatch("kv_dtype", ours, theirs)


class Blocks(Protocol):
    """Copies between one pool and payloads. `pages`: the sequence's page table.

    Both calls may come from several threads at once and block until copied.
    """

    @property
    def digests(self) -> Sequence[str]:
        """Kinds that it makes, preferred first."""

    @property
    def payloads(self) -> Sequence[str]:
        """Dtypes of payloads that it gathers into and scatters from; first that of the pool, which needs no work."""

    def for_payloads(self, dtype: str) -> Blocks:
        """Of the same pool, with payloads of `dtype`, which is one of `payloads`."""

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

    digests: Sequence[str] = (XXH3,)

    def __init__(self, pool: Tensor, layout: PageLayout, *, scales: Tensor | None = None, payload: str = "") -> None:
        """`pool` in logical axis order; `scales` float32 [page, layer, kv, head, token], of a scaled dtype; `payload`:
        dtype of payloads, "" = the pool's. ValueError when the pool is elsewhere, or not of the layout's shape or
        dtype, and when it lacks scales."""
        if pool.device.type != "cpu":
            raise ValueError(f"the pool is on {pool.device}: its owner must bring the blocks that copy there")
        if tuple(pool.shape[1:]) != layout.page_shape or pool.dtype != getattr(torch, layout.dtype):
            raise ValueError(
                f"pool is {pool.dtype} {tuple(pool.shape)}, the layout says {layout.dtype} {layout.page_shape}"
            )
        wanted = pool.shape[:-1] if layout.dtype in SCALED else None
        if (None if scales is None else scales.shape) != wanted:
            raise ValueError(f"a pool of {layout.dtype} needs {'float32 scales beside it' if wanted else 'no scales'}")
        convertible = CONVERTIBLE if layout.dtype in CONVERTIBLE else ()
        self.payloads: Sequence[str] = tuple(dict.fromkeys((layout.dtype, *convertible)))
        self._pool, self._scales, self._layout = pool, scales, layout
        self._payload = replace(layout, dtype=payload or layout.dtype)
        self._raw = self._payload == layout  # nothing is converted
        self._rows = PoolRows(pool.view(_TORCH_WORD[DTYPE_BYTES[layout.dtype]]).numpy())
        self._scale_rows = None if scales is None else PoolRows(scales.unsqueeze(-1).numpy())
        self._scratch = threading.local()

    def for_payloads(self, dtype: str) -> HostBlocks:
        assert dtype in self.payloads, "agreed in the handshake"
        if dtype == self._payload.dtype:
            return self
        return HostBlocks(self._pool, self._layout, scales=self._scales, payload=dtype)

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        digest = seal.running()
        if self._raw and self._scale_rows is None:
            self._rows.read(block, pages, out, digest.update)
            return digest.intdigest()
        own = out if self._raw else self._buffer(block)
        if self._scale_rows is None:
            self._rows.read(block, pages, own)
        else:
            values = block.values_bytes(self._layout)
            self._rows.read(block, pages, own[:values])
            self._scale_rows.read(block, pages, own[values:])
        if not self._raw:
            convert(_cells(own, block, self._layout), _cells(out, block, self._payload))
        digest.update(out)
        return digest.intdigest()

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        if not shared and seal.over(payload) != digest:
            return False
        # Shared memory is digested after it was copied: a foreign byte that the copy saw is still there to be digested,
        # because the right ones were there before their header (the link looks, where a wire cannot promise it) and are
        # not written again; one that comes later spoils a good chunk. Bad ones lie in cells that nobody reads yet.
        last = seal.running()
        digested = last.update if shared else ignore
        if self._raw and self._scale_rows is None:
            self._rows.write(block, pages, payload, digested)
            return not shared or last.intdigest() == digest
        own = payload if self._raw else self._buffer(block)
        if not self._raw:
            convert(_cells(payload, block, self._payload), _cells(own, block, self._layout))
        if self._scale_rows is None:
            self._rows.write(block, pages, own)
        else:
            values = block.values_bytes(self._layout)
            self._rows.write(block, pages, own[:values])
            self._scale_rows.write(block, pages, own[values:])
        digested(payload)
        return not shared or last.intdigest() == digest

    def _buffer(self, block: Block) -> memoryview:
        """Memory of this thread for a block in the pool's own dtype."""
        size = block.bytes(self._layout)
        memory: npt.NDArray[np.uint8] | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._scratch.memory = np.empty(size, dtype=np.uint8)
        return memory[:size].data


def _cells(view: memoryview, block: Block, layout: PageLayout) -> Cells:
    """Values, and the scales of a scaled dtype behind them."""
    size = block.values_bytes(layout)
    values = torch.from_numpy(np.frombuffer(view[:size], np.uint8)).view(getattr(torch, layout.dtype))
    scales = np.frombuffer(view[size:], np.float32) if layout.dtype in SCALED else None
    return Cells(values=values.view(-1, layout.dim), scales=scales)
