"""Blocks of KV between a paged pool and a contiguous payload, with a digest of the payload: the specification.

The digest is multilinear: D = sum of w * K mod 2^64 over the payload's 32-bit words. K is odd and belongs to a word's
logical position (layer, kv, head, token, word), so digests of parts add up to the digest of the whole, in any order,
and page ids do not matter. K = key(row) * key(word) of two splitmix64 keys (Steele, Lea, Flood, OOPSLA 2014): one
product a word, and still a bit that flips anywhere, words that change places, and rows under another layer, head or
token change D. Words have 32 bits because K1 - K2 is even: of 64-bit words those that differ in the top bit alone could
change places unseen. It does not know transfers, slots or pages' owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton_kernels.quant import FP8_DTYPES
from baton_kernels.rt.check import wide
from baton_kernels.rt.program import TYPE_NAMES, Program

WORD_BYTES = 4
TOKEN_BITS, HEAD_BITS, KV_BITS, LAYER_BITS = 31, 12, 1, 12  # of a row's position, from the lowest bit
WORD_DOMAIN = 1 << 63  # keys of words are not keys of rows
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Any of them into any other, and into 8-bit floats."""
SATURATING = (*FP8_DTYPES, torch.float16)
"""What is too large for these becomes their largest; bfloat16 has infinities where float32 rounds to them."""

Range = tuple[int, int]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesShape:
    """One pool and one direction. With equal dtypes bytes are copied as they are, so any view of a row's bytes will do;
    32-bit integers are fastest. Otherwise values are rounded to nearest even."""

    strides: tuple[int, int, int, int, int]  # elements from page to page, layer, kv, head, token; dim is contiguous
    kv: int
    page_tokens: int
    dim: int
    dtype: torch.dtype
    payload: torch.dtype  # the pool's, or other floats; 8-bit floats have factors
    scatter: bool = False  # payload to pool; else pool to payload

    @property
    def label(self) -> str:
        way = f"{'scatter' if self.scatter else 'gather'}-p{self.page_tokens}-d{self.dim}"
        if self.coded:
            return f"{way}-fp8"
        return f"{way}-{TYPE_NAMES[self.dtype]}-{TYPE_NAMES[self.payload]}" if self.converts else way

    @property
    def converts(self) -> bool:
        return self.payload is not self.dtype

    @property
    def coded(self) -> bool:
        """Whether the payload has 8-bit floats, with factors."""
        return self.converts and self.payload in FP8_DTYPES

    @property
    def largest(self) -> float:
        """Magnitude beyond which a value becomes it; 0: there is none."""
        target = self.dtype if self.scatter else self.payload
        return torch.finfo(target).max if self.converts and target in SATURATING else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a sequence's KV; each range is half open."""

    layers: Range
    heads: Range
    tokens: Range  # positions in the sequence

    def shape(self, kv: int, dim: int) -> tuple[int, int, int, int, int]:
        """Of the payload."""
        layers, heads, tokens = (end - begin for begin, end in (self.layers, self.heads, self.tokens))
        return layers, kv, heads, tokens, dim


def as_words(pool: Tensor) -> Tensor:
    """`pool` [..., dim] with the widest integers that its rows consist of and this family copies."""
    for dtype in (torch.int32, torch.int16, torch.int8):
        ratio = dtype.itemsize // pool.element_size()
        if ratio <= 1 or all(size % ratio == 0 for size in (pool.shape[-1], *pool.stride()[:-1])):
            return pool.view(dtype)
    raise AssertionError("a byte divides everything")


# ---- digest ---------------------------------------------------------------------------------------------------------
def _odd_keys(at: U64) -> U64:
    z = at + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def word_keys(count: int) -> U64:
    """Of the words of a row."""
    return _odd_keys(np.arange(count, dtype=np.uint64) | np.uint64(WORD_DOMAIN))


def row_keys(part: Part, kv: int) -> U64:
    """[layers, kv, heads, tokens]"""
    position = np.zeros(1, dtype=np.uint64)
    bits = (LAYER_BITS, KV_BITS, HEAD_BITS, TOKEN_BITS)
    for width, (begin, end) in zip(bits, (part.layers, (0, kv), part.heads, part.tokens), strict=True):
        position = (position[..., None] << np.uint64(width)) | np.arange(begin, end, dtype=np.uint64)
    return _odd_keys(position[0])


def payload_digest(payload: npt.NDArray[Any], part: Part) -> int:
    """Of a payload [layers, kv, heads, tokens, dim] of any type, in host memory. In [0, 2^64)."""
    rows = np.ascontiguousarray(payload).view(np.uint8)
    short = -rows.shape[-1] % WORD_BYTES
    if short:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], short), dtype=np.uint8)], axis=-1)
    words = rows.view(np.uint32).astype(np.uint64)
    per_row = words @ word_keys(words.shape[-1])
    return int((per_row * row_keys(part, payload.shape[1])).sum(dtype=np.uint64))


# ---- copies ---------------------------------------------------------------------------------------------------------
class TorchPages:
    """The specification, on any device; the digest is computed on the host."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: PagesShape) -> None:
        self._shape = shape

    def __call__(
        self,
        pool: Tensor,
        payload: Tensor,
        pages: Tensor,
        part: Part,
        *,
        digest: Tensor,
        factors: Tensor | None = None,
    ) -> None:
        """Copy `part` between pool [page, layer, kv, head, token, dim] and payload [layers, kv, heads, tokens, dim].

        pages int32[n]: the pages of the part's positions in order; pages[0] holds its first one. digest int64[1]: of
        the payload's bytes, as two's complement. factors float32[layer, kv, head] of the pool: with 8-bit codes,
        value = code * factor.
        Positions of the pool outside the part are neither read nor written.
        """
        layers, heads = slice(*part.layers), slice(*part.heads)
        scale = None if factors is None else factors[layers, :, heads, None, None]
        table: list[int] = pages.tolist()
        for index, inside, run in _page_runs(part.tokens, self._shape.page_tokens):
            cells, wire = pool[table[index], layers, :, heads, inside], payload[:, :, :, run]
            if self._shape.scatter:
                cells.copy_(wire if not self._shape.converts else self._decoded(wire, scale))
            else:
                wire.copy_(cells if not self._shape.converts else self._encoded(cells, scale))
        sent = payload.to(self._shape.payload)
        found = payload_digest(sent.view(_NUMPY_WORD[sent.element_size()]).cpu().numpy(), part)
        digest.fill_(found - (found >> 63 << 64))

    def _encoded(self, cells: Tensor, scale: Tensor | None) -> Tensor:
        values = cells.to(wide(cells.dtype))
        return self._saturated(values if scale is None else values / scale).to(self._shape.payload)

    def _decoded(self, wire: Tensor, scale: Tensor | None) -> Tensor:
        values = wire.to(wide(self._shape.dtype))
        return self._saturated(values if scale is None else values * scale)

    def _saturated(self, values: Tensor) -> Tensor:
        largest = self._shape.largest
        return values.clamp(-largest, largest) if largest else values


_NUMPY_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _page_runs(tokens: Range, page_tokens: int) -> Iterator[tuple[int, slice, slice]]:
    """(index in the table, tokens of the page, tokens of the payload)"""
    begin, end = tokens
    position = begin
    while position < end:
        offset = position % page_tokens
        count = min(page_tokens - offset, end - position)
        index = position // page_tokens - begin // page_tokens
        yield index, slice(offset, offset + count), slice(position - begin, position - begin + count)
        position += count
