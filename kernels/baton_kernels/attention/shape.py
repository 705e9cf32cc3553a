"""What an attention is compiled for, how its scores are made, and the rows of a step: shared by all implementations.

KV of one layer is a view [pages, 2, kv_heads, page_tokens, dim] of the pool, last axis contiguous. It may be narrower
than the queries: 8-bit floats with one factor for K and one for V (float32[2]), or int8 with a factor for each token
and head (float32[pages, 2, kv_heads, page_tokens]); value = code * factor.
A tree: bit j of int64 tree[t] says that query token t sees the j-th query token of its own row, itself included. Beyond
the 64th query token, and with all bits set (-1), a row is plainly causal; tokens before the queries are seen as ever.
Parents come before children. The place of a node for the window is its depth, so windows hold at least 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TREE_TOKENS = 64
Upload = Callable[[NDArray[Any]], Tensor]
"""int32 host array -> device tensor, in stream order."""
KvStrides = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One kind of layer of one model on one pool."""

    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    dtype: torch.dtype  # of queries and output
    kv_dtype: torch.dtype
    kv_strides: KvStrides  # elements from one (page, kv, head, token) to the next
    softcap: float | None = None
    sinks: bool = False
    tree: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def padded_dim(self) -> int:
        """Of a tile."""
        return 1 << (self.dim - 1).bit_length()

    @property
    def factors(self) -> int:
        """Axes of kv_scales: 0 where KV needs none."""
        return {torch.int8: 4, torch.float8_e4m3fn: 1, torch.float8_e4m3fnuz: 1}.get(self.kv_dtype, 0)

    @property
    def label(self) -> str:
        """What decides tile sizes: how wide a row of operands is, in 16-bit elements, and how it is converted."""
        width = min(256, self.padded_dim * max(1, self.dtype.itemsize // 2))
        kind = {1: "-fp8", 4: "-int8"}.get(self.factors, "") if width < 256 else ""
        return f"d{width}{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How scores are made. The same for all rows of one layer."""

    scale: float
    window: int | None = None  # a query sees itself and the window - 1 tokens before
    softcap: float | None = None  # cap * tanh(score / cap), Gemma 2
    sinks: Tensor | None = None  # float32[Hq]: one more score per head that takes weight and gives nothing

    @property
    def changed(self) -> bool:
        return self.softcap is not None or self.sinks is not None

    def first_visible(self, position: int) -> int:
        """First KV token that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Which tokens belong to whom: row b owns query tokens [cu_q[b], cu_q[b+1]), the last ones of its kv_lens[b]."""

    page_table: Tensor  # int32[B, P]
    cu_q: Tensor  # int32[B+1]
    kv_lens: Tensor  # int32[B]
    cu_q_host: Sequence[int]
    kv_lens_host: Sequence[int]


def upload_to(device: torch.device) -> Upload:
    """Plain copy; blocks until it is done."""

    def upload(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return upload
