"""Copies cells between a pool in host memory and contiguous payloads, as few large copies outside the interpreter lock.

Any strides work. Where the tokens of a page lie together for one (layer, kv, head), that is one row, and a chunk that
is cut at page borders is one indexed copy of whole rows; what is left over goes page by page. numpy, not torch, which
would start a team of threads in every transfer thread and is slower at it. It does not know dtypes: elements are words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from baton_common.ids import PageId
from baton_kvtransfer.plan import Block, page_runs

Words = npt.NDArray[np.generic]
Indices = npt.NDArray[np.intp]

_REMEMBERED = 1024
_PIECE_BYTES = 512 << 10
"""Copied at once: fits the second-level cache of a core, with room for what is digested after it."""

Copied = Callable[[memoryview], None]


def ignore(piece: memoryview) -> None:
    """Nobody wants to see it."""


class PoolRows:
    """Of a pool [page, layer, kv, head, token, dim]. Safe to use from several threads at once."""

    def __init__(self, pool: Words) -> None:
        self._pool = pool
        page, layer, kv, head, token, dim = (stride // pool.itemsize for stride in pool.strides)
        self._page_tokens, self._dim = pool.shape[4:]
        size = self._page_tokens * self._dim
        together = dim == 1 and (token == self._dim or self._page_tokens == 1)
        self._rows: Words | None = None
        if together and all(stride % size == 0 for stride in (page, layer, kv, head)):
            self._row = np.dtype((np.void, size * pool.itemsize))
            self._strides = tuple(stride // size for stride in (page, layer, kv, head))
            count = 1 + sum((axis - 1) * stride for axis, stride in zip(pool.shape[:4], self._strides, strict=True))
            flat = np.lib.stride_tricks.as_strided(pool, shape=(count * size,), strides=(pool.itemsize,))
            self._rows = flat.view(self._row)
        self._first: dict[tuple[int, int, int, int], Indices] = {}  # of page 0, by layers and heads

    def read(self, block: Block, pages: Sequence[PageId], out: memoryview, copied: Copied = ignore) -> None:
        """Fill `out`, which is as large as the block: [layer, kv, head, token, dim], contiguous.

        `copied` gets each piece of it, in order, as soon as it is filled and still in the processor's cache.
        """
        indices = self._whole(block, pages)
        if indices is not None:
            assert self._rows is not None, "_whole looked"
            for piece, wanted in self._pieces(indices, out):
                # "clip" does not check, and needs no buffer: the endpoint looked at the page table when it got it
                np.take(self._rows, wanted, out=np.frombuffer(piece, self._row), mode="clip")
                copied(piece)
            return
        for cells, part in self._by_page(block, pages, out):
            np.copyto(part, cells)
        copied(out)

    def write(self, block: Block, pages: Sequence[PageId], source: memoryview, copied: Copied = ignore) -> None:
        """The inverse of `read`. `copied` gets each piece of `source` after it was copied."""
        indices = self._whole(block, pages)
        if indices is not None:
            assert self._rows is not None, "_whole looked"
            for piece, wanted in self._pieces(indices, source):
                self._rows[wanted] = np.frombuffer(piece, self._row)
                copied(piece)
            return
        for cells, part in self._by_page(block, pages, source):
            np.copyto(cells, part)
        copied(source)

    def _pieces(self, indices: Indices, view: memoryview) -> Iterator[tuple[memoryview, Indices]]:
        size = self._row.itemsize
        step = max(1, _PIECE_BYTES // size)
        for begin in range(0, len(indices), step):
            wanted = indices[begin : begin + step]
            yield view[begin * size : (begin + len(wanted)) * size], wanted

    def _by_page(self, block: Block, pages: Sequence[PageId], view: memoryview) -> Iterator[tuple[Words, Words]]:
        """What of a page, and of the payload, belongs together."""
        shape = (block.layers, self._pool.shape[2], block.heads, block.tokens, self._dim)
        payload = np.frombuffer(view, self._pool.dtype).reshape(shape)
        layers, heads = slice(block.layer_begin, block.layer_end), slice(block.head_begin, block.head_end)
        for run in page_runs(block, self._page_tokens):
            cells = self._pool[pages[run.page], layers, :, heads, run.offset : run.offset + run.count]
            yield cells, payload[:, :, :, run.begin : run.begin + run.count]

    def _whole(self, block: Block, pages: Sequence[PageId]) -> Indices | None:
        """Rows of a block of whole pages, in the order of its payload; None when its cells are no such rows."""
        size = self._page_tokens
        if self._rows is None or block.token_begin % size or block.token_end % size:
            return None
        touched = np.asarray(pages[block.token_begin // size : block.token_end // size], dtype=np.intp)
        indices: Indices = np.add.outer(self._of_page_0(block), touched * self._strides[0]).reshape(-1)
        return indices

    def _of_page_0(self, block: Block) -> Indices:
        key = (block.layer_begin, block.layer_end, block.head_begin, block.head_end)
        known = self._first.get(key)
        if known is not None:
            return known
        _, layer, kv, head = self._strides
        layers = np.arange(block.layer_begin, block.layer_end, dtype=np.intp) * layer
        kinds = np.arange(self._pool.shape[2], dtype=np.intp) * kv
        heads = np.arange(block.head_begin, block.head_end, dtype=np.intp) * head
        made: Indices = (layers[:, None, None] + kinds[:, None] + heads).reshape(-1)
        if len(self._first) >= _REMEMBERED:
            self._first.clear()
        self._first[key] = made
        return made
