"""KV blocks of a pool in GPU memory: what `KvEndpoint` copies with when the pool is not in host memory.

One kernel gathers, or scatters, and digests in the same pass (`baton_kernels.pages`). Staging memory of our own lies
between pool and slot, so the bytes that are digested are the bytes that are stored, whatever a peer writes into a slot
meanwhile. A call has a lane to itself: a stream beside the engine's, and staging that is kept for the next call; it
waits for its own copies only. Where the payloads of a link have another dtype than the pool, the same kernel rounds as
`baton_kvtransfer.convert` does. It relies on the engine's word that the layers of a gather are complete, and on the
gate that keeps the pages of a scatter. It does not know transfers, links or wires.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from math import prod
from queue import Empty, LifoQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton_common.clock import SystemClock
from baton_common.ids import PageId
from baton_engine.exec.cuda import CudaApi, Patience, TorchCuda
from baton_engine.exec.device import Device
from baton_engine.exec.pool import KvPool
from baton_kernels import pages as kernels
from baton_kernels.library import Library
from baton_kernels.pages import PagesShape, Part, TorchPages, TritonPages
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, Blocks, Seal
from baton_kvtransfer.convert import CONVERTIBLE
from baton_kvtransfer.errors import DeadlineExceeded
from baton_kvtransfer.layout import SCALED
from baton_kvtransfer.plan import Block

log = logging.getLogger("baton.worker")

PLAIN = tuple(dtype for dtype in CONVERTIBLE if dtype not in SCALED)
"""Any of them into any other."""
LANES = 4
"""Copies at once; further links take turns. A GPU has one copy engine for each direction."""
COPY_TIMEOUT_S = 30.0
"""Only a device that hangs takes as long."""
_LEAST_ROOM = 4096
_SUM_BYTES = 8


def blocks_for(device: Device, pool: KvPool) -> Blocks | None:
    """None: the pool is in host memory, which the endpoint copies by itself. Compiles kernels, which takes seconds."""
    index = device.torch_device.index
    if device.torch_device.type == "cpu" or index is None:
        return None
    first = TorchCuda(index)
    lanes = [first, *(first.beside() for _ in range(LANES - 1))]
    return DeviceBlocks(pool.tensor, device.library, lanes, Patience(SystemClock()))


class DeviceBlocks:
    """Of a pool [page, layer, kv, head, token, dim] in GPU memory, strided."""

    digests = (MULTILINEAR, XXH3)

    def __init__(self, pool: Tensor, library: Library, streams: Sequence[CudaApi], patience: Patience) -> None:
        """`streams`: all of the pool's device, one for each lane. ValueError for a dtype with scales beside it: they
        would have to travel too, and no kernel takes them."""
        dtype = str(pool.dtype).removeprefix("torch.")
        if dtype in SCALED:
            raise ValueError(f"a pool of {dtype} on {pool.device} cannot be handed over; set kv_dtype to bfloat16")
        self.payloads: Sequence[str] = tuple(dict.fromkeys((dtype, *(PLAIN if dtype in PLAIN else ()))))
        self._ways = {payload: _way(pool, payload, library) for payload in self.payloads}
        self._way = self._ways[dtype]
        self._lanes: LifoQueue[_Lane] = LifoQueue()
        for stream in streams:
            self._lanes.put(_Lane(stream, patience))

    def for_payloads(self, dtype: str) -> DeviceBlocks:
        """Shares the lanes. Kernels of all payloads were compiled before: a handshake does not wait for them."""
        assert dtype in self.payloads, "agreed in the handshake"
        other = copy(self)
        other._way = self._ways[dtype]
        return other

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        """See `Blocks`."""
        part, size = _part(block), out.nbytes
        with self._lane(size) as lane:
            table = lane.upload_table(self._touched(block, pages))
            self._way.to_payload(self._way.pool, self._payload(lane, part), table, part, digest=lane.sum)
            lane.payload.down(size)
            body = lane.finish()
            np.copyto(np.frombuffer(out, dtype=np.uint8), lane.payload.array(size))
        return seal.around(body) if seal.kind == MULTILINEAR else seal.over(out)

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        """See `Blocks`. It makes no difference whether the payload is shared: what is judged is our copy of it."""
        part, size = _part(block), payload.nbytes
        with self._lane(size) as lane:
            np.copyto(lane.payload.array(size), np.frombuffer(payload, dtype=np.uint8))
            if seal.kind == XXH3 and seal.over(lane.payload.array(size).data) != digest:
                return False
            lane.payload.up(size)
            table = lane.upload_table(self._touched(block, pages))
            self._way.to_pool(self._way.pool, self._payload(lane, part), table, part, digest=lane.sum)
            body = lane.finish()
        return seal.kind == XXH3 or seal.around(body) == digest

    @contextmanager
    def _lane(self, payload_bytes: int) -> Iterator[_Lane]:
        """With its stream current. A lane whose copy failed is not used again: it may still be on its way."""
        try:
            lane = self._lanes.get(timeout=COPY_TIMEOUT_S)
        except Empty:
            raise DeadlineExceeded(f"no copy of KV ended in {COPY_TIMEOUT_S:.0f} s", phase="copy") from None
        with lane.stream.current():
            lane.payload.fit(payload_bytes)
            yield lane
        self._lanes.put(lane)

    def _payload(self, lane: _Lane, part: Part) -> Tensor:
        way = self._way.shape
        shape = part.shape(way.kv, way.dim)
        return lane.payload.device.view(way.payload)[: prod(shape)].view(shape)

    def _touched(self, block: Block, pages: Sequence[PageId]) -> npt.NDArray[np.int32]:
        size = self._way.shape.page_tokens
        return np.asarray(pages[block.token_begin // size : -(-block.token_end // size)], dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Way:
    """Between a pool and payloads of one dtype."""

    pool: Tensor  # as its kernels see it
    shape: PagesShape  # of the gather
    to_payload: TorchPages | TritonPages
    to_pool: TorchPages | TritonPages


def _way(pool: Tensor, payload: str, library: Library) -> _Way:
    dtype: torch.dtype = getattr(torch, payload)
    seen = kernels.as_words(pool) if dtype is pool.dtype else pool
    page, layer, kv, head, token, _ = seen.stride()
    shape = PagesShape(
        strides=(page, layer, kv, head, token),
        kv=seen.shape[2],
        page_tokens=seen.shape[4],
        dim=seen.shape[5],
        dtype=seen.dtype,
        payload=seen.dtype if dtype is pool.dtype else dtype,
    )
    return _Way(
        pool=seen,
        shape=shape,
        to_payload=library.bind(kernels.FAMILY, shape),
        to_pool=library.bind(kernels.FAMILY, replace(shape, scatter=True)),
    )


class _Staging:
    """Bytes that exist twice: on the device, and pinned on the host. Grows, and never shrinks."""

    def __init__(self, stream: CudaApi, room: int) -> None:
        """`stream` is current, here and in every call."""
        self._stream = stream
        self._make(room)

    def _make(self, room: int) -> None:
        self._host = self._stream.pinned((room,), torch.uint8)  # uint8[room], host
        self.device = torch.empty(room, dtype=torch.uint8, device=self._stream.device)  # uint8[room], device

    def fit(self, size: int) -> None:
        """Room for `size` bytes; growing loses what it held."""
        if size > len(self._host):
            self._make(1 << (size - 1).bit_length())

    def array(self, size: int) -> npt.NDArray[np.uint8]:
        """The first bytes on the host."""
        view: npt.NDArray[np.uint8] = self._host[:size].numpy()
        return view

    def up(self, size: int) -> None:
        self.device[:size].copy_(self._host[:size], non_blocking=True)

    def down(self, size: int) -> None:
        self._host[:size].copy_(self.device[:size], non_blocking=True)


class _Lane:
    """What one copy at a time needs."""

    def __init__(self, stream: CudaApi, patience: Patience) -> None:
        self.stream = stream
        self._patience = patience
        with stream.current():
            self.payload = _Staging(stream, _LEAST_ROOM)
            self._table = _Staging(stream, _LEAST_ROOM)
            self._sum = _Staging(stream, _SUM_BYTES)
        self.sum: Tensor = self._sum.device.view(torch.int64)  # int64[1], device

    def upload_table(self, pages: npt.NDArray[np.int32]) -> Tensor:
        """int32[pages], device"""
        size = pages.nbytes
        self._table.fit(size)
        self._table.array(size).view(np.int32)[:] = pages
        self._table.up(size)
        return self._table.device[:size].view(torch.int32)

    def finish(self) -> int:
        """Wait for all that was queued; returns `sum`, in [0, 2^64).

        A device that hangs keeps the caller, and with it the gate of the pages: a copy that cannot be called back may
        still write them. The peer sees silence, and the engine's next step has the deadline that ends the worker.
        """
        self._sum.down(_SUM_BYTES)
        mark = self.stream.mark()
        while not self._patience.until(mark.passed, COPY_TIMEOUT_S):
            log.error("the device does not end a copy of KV; its pages stay held", extra={"waited_s": COPY_TIMEOUT_S})
        return int(self._sum.array(_SUM_BYTES).view(np.uint64)[0])


def _part(block: Block) -> Part:
    return Part(
        layers=(block.layer_begin, block.layer_end),
        heads=(block.head_begin, block.head_end),
        tokens=(block.token_begin, block.token_end),
    )
