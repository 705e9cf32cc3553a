"""From the projection to queries and KV pool in one pass: norm of queries and keys where a model has one, rotation, and
the write of keys and values, in 8 bits where the pool is.

Two pools of 8 bits: e4m3 floats with one static factor for keys and one for values, or integers with a factor per token
and head, written beside them; in both, value = code * factor. It does not know who owns a page; that pages and offsets
are in range is the caller's word, and two tokens on one slot (padding, on the dummy page) leave either's bytes there.

`reference` is the specification, `kernel` the Triton kernel; here is what the oracle, tests and benchmark see of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from baton_kernels.capabilities import Capabilities
from baton_kernels.quant import FP8_DTYPES
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere
from baton_kernels.rope import rope_tables
from baton_kernels.rope_kv.kernel import DIM_STEP, TritonRopeKv, refuses
from baton_kernels.rope_kv.reference import RopeKvShape, TorchRopeKv, write_kv
from baton_kernels.rt.program import Config

__all__ = ["FAMILY", "RopeKvShape", "TorchRopeKv", "TritonRopeKv", "model", "write_kv"]


def model(shape: RopeKvShape, tokens: int) -> Traffic:
    """Reads each head once and writes it once. The tables are one step's and stay in a cache, as the weights do."""
    heads, size = shape.heads + 2 * shape.kv_heads, shape.dtype.itemsize
    factors = 4 if shape.kv_dtype is torch.int8 else 0
    read_and_queries = (heads + shape.heads) * shape.dim * size
    stored = 2 * shape.kv_heads * (shape.dim * shape.kv_dtype.itemsize + factors)
    return Traffic(bytes=tokens * (read_and_queries + stored), flops=tokens * heads * shape.dim * 4)


def _configs(_capabilities: Capabilities, _shape: RopeKvShape) -> Sequence[Config]:
    """TILE: elements of one program, counted in one half of its heads."""
    return [
        {"TILE": 256 * warps * share, "num_warps": warps, "num_stages": 1}
        for warps in (1, 2, 4, 8)
        for share in (1, 2, 4)
    ]


def _call(shape: RopeKvShape, tokens: int, layers: int, random: torch.Generator, device: torch.device) -> Call:
    draw = partial(torch.randn, generator=random, dtype=torch.float32)
    heads, page = shape.heads + 2 * shape.kv_heads, shape.page_tokens
    pages = -(-tokens // page) + 2
    pool = draw(pages, layers, 2, shape.kv_heads, page, shape.dim).to(shape.kv_dtype)
    slots = torch.randperm(pages * page, generator=random)[:tokens]
    frequencies = torch.rand(shape.dim // 2, generator=random)
    positions = torch.randint(0, 64, (tokens,), generator=random)
    cos, sin = rope_tables(positions, frequencies, 1.0, shape.dtype)
    apart = draw(tokens, heads * shape.dim + DIM_STEP).to(shape.dtype)  # a row may be wider than its heads
    arguments = {
        "qkv": apart[:, : heads * shape.dim].view(tokens, heads, shape.dim),
        "cos": cos,
        "sin": sin,
        "write_pages": slots // page,
        "write_offsets": slots % page,
        "out": torch.empty(tokens, shape.heads, shape.dim, dtype=shape.dtype),
    }
    if shape.qk_norm:
        weight = draw(shape.heads + shape.kv_heads, shape.dim).mul_(0.1).add_(1.0)
        arguments |= {"qk_norm": weight if shape.wide else weight.to(shape.dtype)}
    outputs = ["out", "kv"]
    if shape.kv_dtype is torch.int8:
        arguments |= {"scales": draw(pages, 2, shape.kv_heads, page)}
        outputs.append("scales")
    placed = {name: tensor.to(device) for name, tensor in arguments.items()}
    factors = {"k_factor": 0.03, "v_factor": 0.002} if shape.kv_dtype in FP8_DTYPES else {}
    return Call(
        # The layer is cut out where the pool lies, or a copy would have other strides.
        arguments=placed | factors | {"kv": pool.to(device)[:, layers // 2], "eps": 1e-6},
        outputs=tuple(outputs),
        updated=("kv", "scales"),
        units_last_place=() if shape.kv_dtype is shape.dtype else ("kv",),
        precision=shape.dtype,
    )


def _shape(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None,
    *, page: int = 64, layers: int = 32, qk_norm: bool = False, wide: bool = False,
) -> RopeKvShape:  # fmt: skip
    of_head = page * dim
    return RopeKvShape(
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_tokens=page,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        kv_strides=(layers * 2 * kv_heads * of_head, kv_heads * of_head, of_head, dim),
        qk_norm=qk_norm,
        wide=wide,
    )


def cases() -> Sequence[Case[RopeKvShape]]:
    """Each head size with a remainder, each pool, each norm; a head block that mixes kinds and one behind the last."""
    bf16, fp16, fp8, layers = torch.bfloat16, torch.float16, torch.float8_e4m3fn, 3
    few = partial(_shape, page=16, layers=layers)
    small = [
        (few(6, 2, 64, torch.float32), 5),
        (few(14, 2, 64, bf16), 3),
        (few(4, 1, 80, fp16, qk_norm=True), 4),
        (few(3, 3, 96, bf16, qk_norm=True, wide=True), 4),
        (few(8, 2, 128, bf16, qk_norm=True), 2),
        (few(4, 2, 256, fp16, page=128), 1),
        (few(6, 2, 64, bf16, fp8), 20),
        (few(2, 1, 80, torch.float32, fp8, qk_norm=True), 3),
        (few(6, 2, 128, bf16, torch.int8), 4),
        (few(2, 2, 80, fp16, torch.int8, qk_norm=True), 3),
        (few(6, 2, 64, torch.float32), 0),
    ]
    large = [
        (_shape(32, 8, 128, bf16, kv_dtype, layers=layers, qk_norm=qk_norm), tokens)
        for kv_dtype, qk_norm in ((bf16, False), (bf16, True), (fp8, False), (torch.int8, False))
        for tokens in (64, 2048, 8192)
    ]
    return [
        Case(
            name=f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}{'-wide' * shape.wide}-t{tokens}",
            shape=shape,
            make=partial(_call, shape, tokens, layers),
            traffic=model(shape, tokens),
            bench=bench,
            goal=0.85 if bench and tokens > 64 else None,
        )
        for bench, group in ((False, small), (True, large))
        for shape, tokens in group
    ]


def _shapes(capabilities: Capabilities) -> Sequence[RopeKvShape]:
    bf16 = torch.bfloat16
    heads = [(14, 2, 64), (32, 8, 128), (64, 8, 128), (16, 8, 256), (32, 32, 96), (32, 32, 80)]
    shapes = [_shape(*one, bf16) for one in heads]
    shapes += [_shape(32, 8, 128, bf16, qk_norm=True), _shape(8, 4, 256, bf16, qk_norm=True, wide=True)]
    for kv_dtype in (capabilities.fp8, torch.int8):
        if kv_dtype is not None:
            shapes += [_shape(32, 8, 128, bf16, kv_dtype, qk_norm=qk_norm) for qk_norm in (False, True)]
    return shapes


FAMILY: Family[RopeKvShape, TorchRopeKv | TritonRopeKv] = Family(
    op="rope_kv",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonRopeKv, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchRopeKv(shape)),
    ),
    shapes=_shapes,
    cases=cases,
    expects={"_rotate_and_store": ("wide load",)},
)
