"""Which kernels a decoder needs: one operation and shape per use, bound before any weight is read.

The list is made from the spec alone, so it can be printed for a device that is not here (`baton explain kernels`), and
a model that a device cannot compute is refused before gigabytes are read. It does not know how a kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from baton_common.errors import ConfigError
from baton_engine.models.spec import ModelSpec
from baton_kernels import activation, norm, rope_kv
from baton_kernels.activation import GatedShape
from baton_kernels.attention import paged
from baton_kernels.attention.shape import AttentionShape, Scores, Upload
from baton_kernels.families import FAMILIES
from baton_kernels.library import Library
from baton_kernels.norm import NormShape
from baton_kernels.registry import Family, Shape
from baton_kernels.rope_kv.kernel import TritonRopeKv
from baton_kernels.rope_kv.reference import RopeKvShape, TorchRopeKv
from baton_kvtransfer.layout import PageLayout

Norm = norm.TorchNorm | norm.TritonNorm


class Attention(Protocol):
    """What the implementations have in common; each understands only plans of its own."""

    def plan(
        self,
        page_table: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        cu_q_host: Sequence[int],
        kv_lens_host: Sequence[int],
        *,
        window: int | None = None,
        upload: Upload | None = None,
    ) -> object: ...

    def __call__(self, q: Tensor, kv: Tensor, plan: Any, scores: Scores) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShapes:
    """What the operations of one decoder are compiled for."""

    norm: NormShape
    add_norm: NormShape
    rope_kv: RopeKvShape
    attention: AttentionShape
    gated: GatedShape

    def __iter__(self) -> Iterator[tuple[Family[Any, Any], Shape]]:
        yield norm.FAMILY, self.norm
        yield norm.FAMILY, self.add_norm
        yield rope_kv.FAMILY, self.rope_kv
        yield paged.FAMILY, self.attention
        yield activation.FAMILY, self.gated


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderKernels:
    """The bound operations."""

    norm: Norm
    add_norm: Norm  # adds to the residual stream first
    rope_kv: TorchRopeKv | TritonRopeKv
    attention: Attention
    gated: activation.TorchGated | activation.TritonGated


def decoder_shapes(spec: ModelSpec, dtype: torch.dtype, layout: PageLayout) -> DecoderShapes:
    """`dtype` of weights and activations; `layout` of the KV pool."""
    kv_dtype = getattr(torch, layout.dtype)
    page, _, kv, head, token, _ = layout.strides(1)  # of one layer's view; none of them depends on the number of pages
    return DecoderShapes(
        norm=NormShape(width=spec.hidden, dtype=dtype, wide=spec.norm_wide),
        add_norm=NormShape(width=spec.hidden, dtype=dtype, wide=spec.norm_wide, residual=True),
        rope_kv=RopeKvShape(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            dim=spec.head_dim,
            page_tokens=layout.page_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_strides=(page, kv, head, token),
            qk_norm=spec.qk_norm,
            wide=spec.norm_wide,
        ),
        attention=AttentionShape(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            dim=spec.head_dim,
            page_tokens=layout.page_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_strides=(page, kv, head, token),
            softcap=spec.attention_softcap,
        ),
        gated=GatedShape(width=spec.intermediate, dtype=dtype, kind=spec.activation),
    )


def bind_kernels(spec: ModelSpec, dtype: torch.dtype, layout: PageLayout, library: Library) -> DecoderKernels:
    """Choose and compile; takes seconds on a GPU. Unsupported, with every reason, when the device cannot do it."""
    shapes = decoder_shapes(spec, dtype, layout)
    return DecoderKernels(
        norm=library.bind(norm.FAMILY, shapes.norm),
        add_norm=library.bind(norm.FAMILY, shapes.add_norm),
        rope_kv=library.bind(rope_kv.FAMILY, shapes.rope_kv),
        attention=library.bind(paged.FAMILY, shapes.attention),
        gated=library.bind(activation.FAMILY, shapes.gated),
    )


def parse_force(text: str) -> Mapping[str, str]:
    """The setting `engine.kernels`: "attention=flashinfer,rms_norm=torch" -> operation: implementation. ConfigError."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    wrong = next((f"{left}{equals}{right}" for left, equals, right in pairs if not left or not right), None)
    if wrong is not None:
        raise ConfigError(f"kernels has {wrong!r}; write operation=name, like attention=torch", param="kernels")
    wanted = {left.strip(): right.strip() for left, _, right in pairs}
    operations = [family.op for family in FAMILIES]
    if unknown := wanted.keys() - set(operations):
        names = ", ".join(operations)
        raise ConfigError(f"kernels names {', '.join(sorted(unknown))}; operations are {names}", param="kernels")
    return wanted
