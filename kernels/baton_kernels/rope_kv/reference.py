"""The specification: norm of queries and keys where a model has one, rotation, and the write of keys and values.

The CPU runs it. It takes any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_kernels.norm import rms_norm, rms_norm_wide
from baton_kernels.quant import FP8_DTYPES, fp8_codes, int8_codes
from baton_kernels.rope import rotate
from baton_kernels.rt.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeKvShape:
    """Heads of one layer and where its pool has what; the strides are of [pages, 2, kv_heads, page_tokens, dim]."""

    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    dtype: torch.dtype
    kv_dtype: torch.dtype  # `dtype`, an 8-bit float or int8
    kv_strides: tuple[int, int, int, int]  # page, keys or values, head, token; elements
    qk_norm: bool = False
    wide: bool = False  # of the norm: see `baton_kernels.norm`

    @property
    def label(self) -> str:
        stored = {torch.int8: "-int8"} | dict.fromkeys(FP8_DTYPES, "-fp8")
        norm = "-norm" * self.qk_norm
        return f"h{self.heads}-{self.kv_heads}-d{self.dim}{norm}{stored.get(self.kv_dtype, '')}"


def write_kv(k: Tensor, v: Tensor, kv: Tensor, write_pages: Tensor, write_offsets: Tensor) -> None:
    """Store k, v [T, Hkv, D] of T tokens at (write_pages[t], write_offsets[t]) of one layer's view, in its dtype."""
    kv[:, 0][write_pages, :, write_offsets] = k.to(kv.dtype)
    kv[:, 1][write_pages, :, write_offsets] = v.to(kv.dtype)


class TorchRopeKv:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: RopeKvShape) -> None:
        self._heads = shape.heads
        self._rotated = shape.heads + shape.kv_heads
        self._norm = rms_norm_wide if shape.wide else rms_norm

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
        """Queries [T, heads, dim], normalised and rotated, in `out` or, where it is None, in a new tensor.

        qkv [T, heads + 2 * kv_heads, dim]: queries, keys, values; tokens may lie apart. cos [T, 1, dim] and
        sin [T, 1, dim / 2]: `rope_tables`. kv [pages, 2, kv_heads, page_tokens, dim]: keys and values of token t go to
        page write_pages[t], place write_offsets[t] (int64). qk_norm [heads + kv_heads, dim]: weights, float32 where the
        shape is `wide`. k_factor, v_factor: of a pool of 8-bit floats. scales float32[pages, 2, kv_heads, page_tokens]:
        receives the factors of an int8 pool.
        """
        qk = qkv[:, : self._rotated]
        if qk_norm is not None:
            qk = self._norm(qk, qk_norm, eps)
        qk = rotate(qk, cos, sin)
        k, v = qk[:, self._heads :], qkv[:, self._rotated :]
        if kv.dtype in FP8_DTYPES:
            # Indexed writes are not made for 8-bit floats; their bytes are written.
            k, v = (fp8_codes(x, factor, kv.dtype).view(torch.uint8) for x, factor in ((k, k_factor), (v, v_factor)))
            kv = kv.view(torch.uint8)
        elif kv.dtype is torch.int8:
            assert scales is not None, "an int8 pool has factors beside it"
            (k, k_scale), (v, v_scale) = int8_codes(k), int8_codes(v)
            scales[:, 0][write_pages, :, write_offsets] = k_scale.to(scales.dtype)
            scales[:, 1][write_pages, :, write_offsets] = v_scale.to(scales.dtype)
        write_kv(k, v, kv, write_pages, write_offsets)
        queries = qk[:, : self._heads]
        return queries if out is None else out.copy_(queries)
