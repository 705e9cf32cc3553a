"""Copies blocks between pool pages and slots, and digests them. The only place that touches KV bytes.

The owner of a pool gathers from it and scatters into it; nobody else does. A few large copies per chunk, each outside
the interpreter lock. Host pools go through numpy: torch would start an OpenMP team in every transfer thread, and its
strided copy is slower (6.7 against 9.6 GB/s for 16 KiB runs).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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

DIGEST = "xxh3_64"
_TORCH_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_HEADER = struct.Struct("<8IQQ")


class Blocks(Protocol):
    """Copies between one pool and payloads. `pages`: the sequence's page table. Both calls block until copied."""

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview) -> None: ...

    def scatter(self, block: Block, pages: Sequence[PageId], payload: memoryview) -> None: ...


def blocks_of(pool: Tensor, layout: PageLayout) -> Blocks:
    """`pool` in logical axis order. Raises ValueError when it does not have the layout's shape or dtype."""
    if tuple(pool.shape[1:]) != layout.page_shape or pool.dtype != getattr(torch, layout.dtype):
        raise ValueError(
            f"pool is {pool.dtype} {tuple(pool.shape)}, the layout says {layout.dtype} {layout.page_shape}"
        )
    return HostBlocks(pool, layout) if pool.device.type == "cpu" else DeviceBlocks(pool, layout)


class HostBlocks:
    def __init__(self, pool: Tensor, layout: PageLayout) -> None:
        self._layout = layout
        self._pool: npt.NDArray[np.generic] = pool.view(_TORCH_WORD[DTYPE_BYTES[layout.dtype]]).numpy()

    def _payload(self, block: Block, view: memoryview) -> npt.NDArray[np.generic]:
        return np.frombuffer(view, dtype=self._pool.dtype).reshape(block.shape(self._layout))

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview) -> None:
        payload = self._payload(block, out)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._layout.page_tokens):
            source = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            np.copyto(payload[:, :, :, run.begin : run.begin + run.count], source)

    def scatter(self, block: Block, pages: Sequence[PageId], payload: memoryview) -> None:
        source = self._payload(block, payload)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._layout.page_tokens):
            target = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            np.copyto(target, source[:, :, :, run.begin : run.begin + run.count])


class DeviceBlocks:
    """Any torch device, through its own copies: right everywhere, fast where a kernel replaces it."""

    def __init__(self, pool: Tensor, layout: PageLayout) -> None:
        self._layout = layout
        self._pool = pool.view(_TORCH_WORD[DTYPE_BYTES[layout.dtype]])

    def _payload(self, block: Block, view: memoryview) -> Tensor:
        return torch.frombuffer(view, dtype=self._pool.dtype).view(block.shape(self._layout))

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview) -> None:
        payload = self._payload(block, out)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        staged = torch.empty(payload.shape, dtype=payload.dtype, device=self._pool.device)
        for run in page_runs(block, self._layout.page_tokens):
            source = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            staged[:, :, :, run.begin : run.begin + run.count].copy_(source)
        payload.copy_(staged)

    def scatter(self, block: Block, pages: Sequence[PageId], payload: memoryview) -> None:
        staged = self._payload(block, payload).to(self._pool.device)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._layout.page_tokens):
            target = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            target.copy_(staged[:, :, :, run.begin : run.begin + run.count])
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream(self._pool.device).synchronize()


def digest(chunk: Chunk, payload: memoryview) -> int:
    """xxh3_64 over the payload, seeded with the header: bytes that land under a wrong header do not match either."""
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
    seed = xxhash.xxh3_64_intdigest(header + chunk.transfer_id.encode())
    return xxhash.xxh3_64_intdigest(payload, seed)
