"""How KV bytes lie in a pool: the shape every page has, and the order of its axes.

Logical axes are always (page, layer, kv, head, token, dim). The physical order is an enum of permutations; everything
that touches a pool works with the strides that follow from it, so an order is data, not code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

AXES = ("page", "layer", "kv", "head", "token", "dim")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
SCALED = frozenset({"float8_e4m3fn"})
"""Have a float32 factor for each (layer, kv, head, token) beside them: value = code * factor."""
SCALE_BYTES = 4


class AxisOrder(Enum):
    """Physical order, outermost first."""

    PAGE_LAYER_KV_HEAD_TOKEN_DIM = ("page", "layer", "kv", "head", "token", "dim")
    LAYER_PAGE_KV_HEAD_TOKEN_DIM = ("layer", "page", "kv", "head", "token", "dim")
    PAGE_LAYER_KV_TOKEN_HEAD_DIM = ("page", "layer", "kv", "token", "head", "dim")
    LAYER_PAGE_KV_TOKEN_HEAD_DIM = ("layer", "page", "kv", "token", "head", "dim")

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Shape and order of one rank's KV pool. Pages cross between any two layouts of the same model."""

    layers: int
    kv: int  # 2 (keys and values); 1 for MLA
    heads: int  # KV heads of this rank
    page_tokens: int  # 16..128
    dim: int
    dtype: str  # key of DTYPE_BYTES
    order: AxisOrder = AxisOrder.PAGE_LAYER_KV_HEAD_TOKEN_DIM

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; one of {sorted(DTYPE_BYTES)}")
        if not 1 <= self.page_tokens <= 128:
            raise ValueError(f"page_tokens is {self.page_tokens}; use 16 to 128")

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """(layer, kv, head, token, dim)."""
        return (self.layers, self.kv, self.heads, self.page_tokens, self.dim)

    @property
    def page_bytes(self) -> int:
        """Without the scales of a scaled dtype, which lie elsewhere."""
        return prod(self.page_shape) * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.page_bytes // self.page_tokens

    @property
    def layer_token_bytes(self) -> int:
        """KV bytes of one token in one layer."""
        return self.token_bytes // self.layers

    def shape(self, pages: int) -> tuple[int, ...]:
        """Logical shape of a pool of `pages` pages."""
        return (pages, *self.page_shape)

    def strides(self, pages: int) -> tuple[int, ...]:
        """Element strides in logical axis order."""
        sizes = dict(zip(AXES, self.shape(pages), strict=True))
        strides: dict[str, int] = {}
        step = 1
        for axis in reversed(self.order.value):
            strides[axis] = step
            step *= sizes[axis]
        return tuple(strides[axis] for axis in AXES)
