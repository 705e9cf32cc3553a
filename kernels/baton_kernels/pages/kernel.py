"""One pass between a pool's pages and a payload, digested on the way: the Triton kernel and the operation around it.

A program moves one tile of tokens of one (layer, kv, head); a tile lies in one page, so that is one page id and, in
both orders of a pool, one contiguous run on each side. Its share of the digest is added atomically: integers, so any
order gives the same sum. Other floats are made on the way, and the digest is of what travels.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.pages.reference import (
    FLOATS,
    HEAD_BITS,
    KV_BITS,
    LAYER_BITS,
    TOKEN_BITS,
    WORD_BYTES,
    WORD_DOMAIN,
    PagesShape,
    Part,
)
from baton_kernels.registry import needs_triton
from baton_kernels.rt.check import check
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import TYPE_NAMES, Config, InputError, Program, pointer

_HEAD_AT = tl.constexpr(TOKEN_BITS)
_KV_AT = tl.constexpr(TOKEN_BITS + HEAD_BITS)
_LAYER_AT = tl.constexpr(TOKEN_BITS + HEAD_BITS + KV_BITS)
_WORD_DOMAIN = tl.constexpr(WORD_DOMAIN)


@jit
def _odd_keys(at):
    """See reference._odd_keys; uint64."""
    z = at + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) | 1


@jit
def _tile_digest(x, row, LANES: tl.constexpr, BITS: tl.constexpr):
    """Of elements x [ROWS, LANES] of BITS bits, zero where the tile ends, in rows at positions row uint64[ROWS]."""
    rows: tl.constexpr = x.shape[0]
    if BITS == 32:
        words = x.to(tl.uint32, bitcast=True)
    else:
        unit = x.to(tl.uint16 if BITS == 16 else tl.uint8, bitcast=True)
        per: tl.constexpr = 32 // BITS
        shift = (tl.arange(0, LANES) % per * BITS).to(tl.uint32)
        words = tl.sum(tl.reshape(unit.to(tl.uint32) << shift[None, :], (rows, LANES // per, per)), 2)
    count: tl.constexpr = LANES * BITS // 32
    lane = tl.arange(0, count).to(tl.uint64) | _WORD_DOMAIN
    products = words.to(tl.uint64) * _odd_keys(lane)[None, :]
    run: tl.constexpr = 4 if count >= 4 else count  # what one thread holds of a row: no exchange between threads yet
    partial = tl.sum(tl.reshape(products, (rows, count // run, run)), 2)
    return tl.sum(partial * _odd_keys(row)[:, None])


@jit
def _rounded(values, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """float32 `values` in `dtype`; see PagesShape.largest. NaN stays NaN."""
    if LARGEST > 0.0:
        values = tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return cast(values, dtype)


@jit
def _copy_tiles(
    POOL, PAYLOAD, TABLE, FACTORS, DIGEST, layer_begin, head_begin, heads, token_begin, token_end, pool_heads,
    S_PAGE: tl.constexpr, S_LAYER: tl.constexpr, S_KV: tl.constexpr, S_HEAD: tl.constexpr, S_TOKEN: tl.constexpr,
    KV: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr, SCATTER: tl.constexpr, CONVERT: tl.constexpr, CODED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of tokens, kv * heads, layers) of the part. Unless CODED, FACTORS is not touched."""
    first = token_begin // ROWS * ROWS + tl.program_id(0) * ROWS
    kv, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    layer = tl.program_id(2)
    page = tl.load(TABLE + first // PAGE - token_begin // PAGE).to(tl.int64)
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    inside = ((first + rows >= token_begin) & (first + rows < token_end))[:, None] & (lanes < DIM)[None, :]
    layer_at, head_at = layer_begin + layer, head_begin + head
    cells = POOL + page * S_PAGE + layer_at.to(tl.int64) * S_LAYER + kv * S_KV + head_at * S_HEAD
    cells += (first % PAGE + rows)[:, None] * S_TOKEN + lanes[None, :]
    run = ((layer.to(tl.int64) * KV + kv) * heads + head) * (token_end - token_begin)
    wire = PAYLOAD + run * DIM + ((first - token_begin + rows) * DIM)[:, None] + lanes[None, :]
    if not CONVERT:
        if SCATTER:
            sent = tl.load(wire, mask=inside, other=0)
            tl.store(cells, sent, mask=inside)
        else:
            sent = tl.load(cells, mask=inside, other=0)
            tl.store(wire, sent, mask=inside)
    else:
        factor = tl.load(FACTORS + (layer_at * KV + kv) * pool_heads + head_at) if CODED else 1.0
        if SCATTER:
            sent = tl.load(wire, mask=inside, other=0.0)
            values = sent.to(tl.float32)
            if CODED:
                values *= factor
            tl.store(cells, _rounded(values, POOL.dtype.element_ty, LARGEST), mask=inside)
        else:
            values = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
            if CODED:
                values /= factor
            sent = _rounded(values, PAYLOAD.dtype.element_ty, LARGEST)
            tl.store(wire, sent, mask=inside)
    row = (first + rows).to(tl.uint64) | (head_at.to(tl.uint64) << _HEAD_AT)
    row |= (kv.to(tl.uint64) << _KV_AT) | (layer_at.to(tl.uint64) << _LAYER_AT)
    found = _tile_digest(sent, row, LANES, BITS)
    tl.atomic_add(DIGEST, found.to(tl.int64, bitcast=True), sem="relaxed")


class TritonPages:
    """See `TorchPages.__call__`. The grid follows from `part`, which the host knows; nothing is read back."""

    def __init__(self, capabilities: Capabilities, shape: PagesShape, config: Config) -> None:
        self._shape = shape
        self._rows = tile_rows(shape, config["BLOCK_BYTES"])
        page, layer, kv, head, token = shape.strides
        self._program = Program(
            _copy_tiles,
            types={
                "POOL": pointer(shape.dtype),
                "PAYLOAD": pointer(shape.payload),
                "TABLE": pointer(torch.int32),
                "FACTORS": pointer(torch.float32 if shape.coded else torch.int64),
                "DIGEST": pointer(torch.int64),
                "layer_begin": "i32",
                "head_begin": "i32",
                "heads": "i32",
                "token_begin": "i32",
                "token_end": "i32",
                "pool_heads": "i32",
            },
            constants={
                "S_PAGE": page,
                "S_LAYER": layer,
                "S_KV": kv,
                "S_HEAD": head,
                "S_TOKEN": token,
                "KV": shape.kv,
                "PAGE": shape.page_tokens,
                "DIM": shape.dim,
                "LANES": _lanes(shape),
                "ROWS": self._rows,
                "BITS": 8 * shape.payload.itemsize,
                "SCATTER": shape.scatter,
                "CONVERT": shape.converts,
                "CODED": shape.coded,
                "LARGEST": shape.largest,
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs: Sequence[Program] = (self._program,)

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
        shape = self._shape
        wanted = part.shape(shape.kv, shape.dim)
        check(pool, "pool", (None, None, shape.kv, None, shape.page_tokens, shape.dim), shape.dtype)
        if pool.stride()[:-1] != shape.strides:
            raise InputError(f"pool has strides {pool.stride()[:-1]}, the operation is bound for {shape.strides}")
        check(payload, "payload", wanted, shape.payload)
        if not payload.is_contiguous():
            raise InputError(f"payload is not contiguous (strides {payload.stride()}); make a copy of it")
        _check_part(part, pool)
        begin, end = part.tokens
        touched = -(-end // shape.page_tokens) - begin // shape.page_tokens if end > begin else 0
        check(pages, "pages", (None,), torch.int32)
        if len(pages) < touched:
            raise InputError(f"pages has {len(pages)} entries, positions [{begin}, {end}) lie in {touched}")
        check(digest, "digest", (1,), torch.int64)
        if shape.coded:
            assert factors is not None, "8-bit codes mean nothing without factors"
            check(factors, "factors", (pool.shape[1], shape.kv, pool.shape[3]), torch.float32)
        digest.zero_()
        if not payload.numel():
            return
        tiles = -(-end // self._rows) - begin // self._rows
        layers, heads = wanted[0], wanted[2]
        self._program(
            (tiles, shape.kv * heads, layers),
            pool, payload, pages, digest if factors is None else factors, digest,
            part.layers[0], part.heads[0], heads, begin, end, pool.shape[3],
        )  # fmt: skip


def _check_part(part: Part, pool: Tensor) -> None:
    """Positions beyond these have no key of their own, or no place in the pool."""
    layers, heads = min(pool.shape[1], 1 << LAYER_BITS), min(pool.shape[3], 1 << HEAD_BITS)
    for name, (begin, end), count in (
        ("layers", part.layers, layers),
        ("heads", part.heads, heads),
        ("tokens", part.tokens, 1 << TOKEN_BITS),
    ):
        if not 0 <= begin <= end <= count:
            raise InputError(f"{name} [{begin}, {end}) are not in [0, {count})")


def _lanes(shape: PagesShape) -> int:
    """Elements of a row in a tile: a power of two, at least one word."""
    least = WORD_BYTES // shape.payload.itemsize
    return max(least, 1 << (shape.dim - 1).bit_length())


def tile_rows(shape: PagesShape, block_bytes: int) -> int:
    """Tokens of a tile: a power of two that divides a page, and no more than `block_bytes` on the wider side."""
    fit = max(1, block_bytes // (_lanes(shape) * max(shape.dtype.itemsize, shape.payload.itemsize)))
    return min(shape.page_tokens & -shape.page_tokens, 1 << (fit.bit_length() - 1))


MAX_DIM = 4096


def refuses(capabilities: Capabilities, shape: PagesShape) -> str:
    """Why the Triton kernel cannot; "" when it can."""
    if why := needs_triton(capabilities):
        return why
    if shape.dtype not in TYPE_NAMES or shape.dtype.itemsize > WORD_BYTES:
        return f"elements of {shape.dtype} are not copied; view the pool as int32"
    if shape.kv > 1 << KV_BITS:
        return f"{shape.kv} tensors per head have no place in the digest; keys and values do"
    if shape.dim > MAX_DIM:
        return f"rows of {shape.dim} elements do not fit in one program; {MAX_DIM} do"
    if shape.coded and shape.payload is not capabilities.fp8:
        return f"{capabilities.name} has no 8-bit floats of the kind {shape.payload}"
    if shape.converts and not (shape.coded or shape.payload in FLOATS):
        return f"{shape.payload} is not converted; {', '.join(map(str, FLOATS))} are"
    if shape.converts and shape.dtype not in FLOATS:
        return f"{shape.payload} is made of floats, not of {shape.dtype}"
    return ""
