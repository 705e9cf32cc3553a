"""The Triton kernel: a program turns or copies some heads of one token, all 16 bytes at a time.

A head is worked on as its two halves, so that the rotation needs nothing from another thread.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.quant import FP8_DTYPES, fp8_max, round_even
from baton_kernels.registry import needs_triton
from baton_kernels.rope_kv.reference import RopeKvShape
from baton_kernels.rt.check import check, check_contiguous, check_rows, lanes
from baton_kernels.rt.language import cast, jit, tl
from baton_kernels.rt.program import Config, InputError, Program, pointer

DIM_STEP, MAX_DIM = 16, 256  # half a head is whole accesses of 8 elements


@jit
def _normalised(x, inverse, weight, dtype: tl.constexpr, WIDE: tl.constexpr):
    """One half of the heads, rounded where `rms_norm` or `rms_norm_wide` rounds."""
    y = x * inverse
    if not WIDE:
        y = cast(y, dtype).to(tl.float32)
    return cast(y * weight, dtype).to(tl.float32)


@jit
def _rotate_and_store(
    QKV, WEIGHT, COS, SIN, KV, PAGES, OFFSETS, SCALES, OUT, eps, k_factor, v_factor, s_qkv, s_scales,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    S_PAGE: tl.constexpr, S_KV: tl.constexpr, S_HEAD: tl.constexpr, S_TOKEN: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, FP8_MAX: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (t, i): heads [i * HEADS, (i + 1) * HEADS) of token t, each as its two halves of at most BLOCK elements.

    FP8_MAX > 0: the pool holds 8-bit floats; KV int8: integers with SCALES; otherwise what comes out of the rotation.
    """
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    here = at < HALF
    inside = (head < QUERIES + 2 * KEYS)[:, None] & here[None, :]
    turns = (head < QUERIES + KEYS)[:, None]  # values are stored as they came
    within = head[:, None] * DIM + at[None, :]
    x = QKV + tl.multiple_of(token * s_qkv, LANES) + within
    low = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = QKV.dtype.element_ty
    if NORM:
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
        weight = tl.load(WEIGHT + within, mask=inside & turns, other=0.0).to(tl.float32)
        low = tl.where(turns, _normalised(low, inverse, weight, dtype, WIDE), low)
        weight = tl.load(WEIGHT + within + HALF, mask=inside & turns, other=0.0).to(tl.float32)
        high = tl.where(turns, _normalised(high, inverse, weight, dtype, WIDE), high)
    cos = tl.load(COS + token * DIM + at, mask=here, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + token * HALF + at, mask=here, other=0.0).to(tl.float32)[None, :]
    turned = low * cos - high * sin
    high = tl.where(turns, high * cos + low * sin, high)
    low = tl.where(turns, turned, low)

    queries = inside & (head < QUERIES)[:, None]
    out = OUT + token * (QUERIES * DIM) + within
    tl.store(out, cast(low, OUT.dtype.element_ty), mask=queries)
    tl.store(out + HALF, cast(high, OUT.dtype.element_ty), mask=queries)

    page = tl.load(PAGES + token)
    offset = tl.load(OFFSETS + token)
    value = (head >= QUERIES + KEYS).to(tl.int32)
    kv_head = head - QUERIES - value * KEYS
    stored = inside & (head >= QUERIES)[:, None]
    if FP8_MAX > 0:
        factor = tl.where(value == 1, v_factor, k_factor)[:, None]
        low = tl.clamp(low / factor, -FP8_MAX, FP8_MAX)
        high = tl.clamp(high / factor, -FP8_MAX, FP8_MAX)
    elif KV.dtype.element_ty == tl.int8:
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.maximum(largest / 127.0, 1e-12)
        low = round_even(low / scale[:, None])
        high = round_even(high / scale[:, None])
        place = (value * KEYS + kv_head) * PAGE_TOKENS + offset
        written = (head >= QUERIES) & (head < QUERIES + 2 * KEYS)
        tl.store(SCALES + page * s_scales + place, scale, mask=written)
    slot = KV + page * S_PAGE + offset * S_TOKEN + (value * S_KV + kv_head * S_HEAD)[:, None] + at[None, :]
    tl.store(slot, cast(low, KV.dtype.element_ty), mask=stored)
    tl.store(slot + HALF, cast(high, KV.dtype.element_ty), mask=stored)


class TritonRopeKv:
    """See `TorchRopeKv.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: RopeKvShape, config: Config) -> None:
        self._shape = shape
        self._total = shape.heads + 2 * shape.kv_heads
        self._lanes = lanes(shape.dim, shape.dtype)
        block = 1 << (shape.dim // 2 - 1).bit_length()
        block_heads = min(max(config["TILE"] // block, 1), 1 << (self._total - 1).bit_length())
        self._blocks = -(-self._total // block_heads)
        self._program = Program(
            _rotate_and_store,
            types={
                "QKV": pointer(shape.dtype),
                "WEIGHT": pointer(torch.float32 if shape.qk_norm and shape.wide else shape.dtype),
                "COS": pointer(shape.dtype),
                "SIN": pointer(shape.dtype),
                "KV": pointer(shape.kv_dtype),
                "PAGES": "*i64~",  # parts of one buffer begin where they begin
                "OFFSETS": "*i64~",
                "SCALES": pointer(torch.float32 if shape.kv_dtype is torch.int8 else shape.dtype) + "~",
                "OUT": pointer(shape.dtype),
                **dict.fromkeys(("eps", "k_factor", "v_factor"), "fp32"),
                **dict.fromkeys(("s_qkv", "s_scales"), "i32"),
            },
            constants={
                "QUERIES": shape.heads,
                "KEYS": shape.kv_heads,
                "DIM": shape.dim,
                "PAGE_TOKENS": shape.page_tokens,
                **dict(zip(("S_PAGE", "S_KV", "S_HEAD", "S_TOKEN"), shape.kv_strides, strict=True)),
                "LANES": self._lanes,
                "BLOCK": block,
                "NORM": shape.qk_norm,
                "WIDE": shape.wide,
                "FP8_MAX": fp8_max(shape.kv_dtype) if shape.kv_dtype in FP8_DTYPES else 0.0,
                "HEADS": block_heads,
            },
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        write_pages: Tensor,
        write_offsets: Tensor,
        *,
        qk_norm: Tensor | None = None,
        eps: float = 0.0,
        k_factor: float = 1.0,
        v_factor: float = 1.0,
        scales: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        shape, tokens = self._shape, qkv.shape[0]
        if out is None:
            out = torch.empty(tokens, shape.heads, shape.dim, dtype=qkv.dtype, device=qkv.device)
        self._check(qkv, kv, out, scales)
        for tensor, name, size in ((cos, "cos", (tokens, 1, shape.dim)), (sin, "sin", (tokens, 1, shape.dim // 2))):
            check(tensor, name, size)
            check_contiguous(tensor, name)
        check(write_pages, "write_pages", (tokens,))
        check(write_offsets, "write_offsets", (tokens,))
        assert shape.qk_norm == (qk_norm is not None), "bound for the other way"
        if qk_norm is not None:
            check(qk_norm, "qk_norm", (shape.heads + shape.kv_heads, shape.dim))
            check_contiguous(qk_norm, "qk_norm")
        self._program(
            (tokens, self._blocks, 1), qkv, qkv if qk_norm is None else qk_norm, cos, sin, kv,
            write_pages, write_offsets, qkv if scales is None else scales, out,
            eps, k_factor, v_factor, qkv.stride(0), 0 if scales is None else scales.stride(0),
        )  # fmt: skip
        return out

    def _check(self, qkv: Tensor, kv: Tensor, out: Tensor, scales: Tensor | None) -> None:
        shape, tokens = self._shape, qkv.shape[0]
        check(qkv, "qkv", (None, self._total, shape.dim))
        if qkv.stride(1) != shape.dim:
            raise InputError(f"qkv has heads {qkv.stride(1)} elements apart, expected {shape.dim}")
        check_rows(qkv, "qkv", self._lanes)
        check(out, "out", (tokens, shape.heads, shape.dim))
        check_contiguous(out, "out")
        check(kv, "kv", (None, 2, shape.kv_heads, shape.page_tokens, shape.dim))
        if kv.stride()[:-1] != shape.kv_strides:
            raise InputError(f"kv has strides {list(kv.stride())}, compiled for {[*shape.kv_strides, 1]}")
        assert (shape.kv_dtype is torch.int8) == (scales is not None), "an int8 pool, and only that, has factors"
        if scales is not None:
            check(scales, "scales", (kv.shape[0], 2, shape.kv_heads, shape.page_tokens))
            check_contiguous(scales[:1], "scales of one page")


def refuses(capabilities: Capabilities, shape: RopeKvShape) -> str:
    """Why the kernel cannot, in a clause; "" = it can."""
    if why := needs_triton(capabilities):
        return why
    if shape.dim % DIM_STEP or not DIM_STEP <= shape.dim <= MAX_DIM:
        return f"heads of {shape.dim} elements; multiples of {DIM_STEP} up to {MAX_DIM} can be rotated"
    if shape.kv_dtype in FP8_DTYPES and shape.kv_dtype is not capabilities.fp8:
        native = str(capabilities.fp8 or "no 8-bit floats").removeprefix("torch.")
        return f"a pool of {shape.kv_dtype} on {capabilities.name}, which has {native}".replace("torch.", "")
    if shape.kv_dtype not in (shape.dtype, torch.int8, *FP8_DTYPES):
        return f"a pool of {shape.kv_dtype} for a model of {shape.dtype}".replace("torch.", "")
    return ""
