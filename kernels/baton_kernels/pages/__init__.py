"""Blocks of KV between a paged pool and a contiguous payload, with a positional digest in the same pass; optionally as
other floats on the way.

`reference` is the specification, `kernel` the Triton kernel; here is what the oracle, tests and benchmark see of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import permutations
from math import prod

import torch

from baton_kernels.capabilities import Capabilities
from baton_kernels.pages.kernel import TritonPages, refuses
from baton_kernels.pages.reference import FLOATS, PagesShape, Part, TorchPages, as_words, payload_digest
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere
from baton_kernels.rt.program import Config

__all__ = ["FAMILY", "PagesShape", "Part", "TorchPages", "TritonPages", "as_words", "call", "model", "payload_digest"]


def shape_of(
    pool: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    *,
    payload: torch.dtype | None = None,
    scatter: bool = False,
    layer_first: bool = False,
) -> PagesShape:
    """Of a dense pool of shape [page, layer, kv, head, token, dim] whose pages, or layers, are outermost. `payload`
    None: as the pool."""
    pages, layers, kv, heads, tokens, dim = pool
    per_layer = kv * heads * tokens * dim
    outer = (per_layer, pages * per_layer) if layer_first else (layers * per_layer, per_layer)
    return PagesShape(
        strides=(*outer, heads * tokens * dim, tokens * dim, dim),
        kv=kv,
        page_tokens=tokens,
        dim=dim,
        dtype=dtype,
        payload=payload or dtype,
        scatter=scatter,
    )


def model(shape: PagesShape, part: Part) -> Traffic:
    """Reads and writes every element once; the page table is nothing beside it."""
    elements = prod(part.shape(shape.kv, shape.dim))
    return Traffic(bytes=elements * (shape.dtype.itemsize + shape.payload.itemsize), flops=0)


def _configs(_capabilities: Capabilities, _shape: PagesShape) -> Sequence[Config]:
    return [
        {"BLOCK_BYTES": size, "num_warps": warps, "num_stages": 1}
        for size in (4096, 8192, 16384, 32768)
        for warps in (2, 4, 8)
    ]


TRAVELS = (
    (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.bfloat16, True),
    (torch.float32, torch.float16, True),
    (torch.bfloat16, torch.float16, False),
)
"""(pool, payload, scatter): the narrower dtype travels, of two that are equally wide the receiver's."""


# ---- cases ----------------------------------------------------------------------------------------------------------
PoolShape = tuple[int, int, int, int, int, int]


def call(shape: PagesShape, pool: PoolShape, part: Part, random: torch.Generator, device: torch.device) -> Call:
    """Random page table. What the part does not own is NaN, or a number that must not appear elsewhere."""
    count, layers, kv, heads, size, dim = pool
    first, last = part.tokens[0] // size, -(-part.tokens[1] // size)
    table = torch.randperm(count, generator=random)[: max(0, last - first)].to(torch.int32)
    cells = _noise(prod(pool), shape.dtype, random).as_strided(pool, (*shape.strides, 1))
    if shape.dtype.is_floating_point and not shape.scatter:
        free = torch.ones(count, dtype=torch.bool)
        free[table.long()] = False
        cells[free] = float("nan")
    wire = part.shape(kv, dim)
    payload = _noise(prod(wire), shape.payload, random).view(wire)
    arguments = {
        "pool": cells.to(device),
        "payload": payload.to(device),
        "pages": table.to(device),
        "part": part,
        "digest": torch.zeros(1, dtype=torch.int64, device=device),
    }
    if shape.coded:
        arguments["factors"] = (torch.rand(layers, kv, heads, generator=random) + 0.5).to(device)
    outputs: tuple[str, ...] = ("pool" if shape.scatter else "payload",)
    exact = () if shape.coded else outputs
    if shape.scatter or not shape.coded:  # codes may be off by one unit, and then so is their digest
        outputs, exact = (*outputs, "digest"), (*exact, "digest")
    return Call(
        arguments=arguments,
        outputs=outputs,
        updated=("pool",) if shape.scatter else (),
        units_last_place=("payload",) if shape.coded and not shape.scatter else (),
        exact=exact,
        precision=shape.dtype if shape.coded else torch.float32,
    )


def _noise(count: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(count, generator=random).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, (count,), generator=random, dtype=dtype)


def cases() -> Sequence[Case[PagesShape]]:
    """Both directions and both orders of a pool; first and last pages in part, one token, none; odd sizes."""
    part = Part(layers=(1, 3), heads=(1, 2), tokens=(5, 40))
    pool: PoolShape = (6, 3, 2, 2, 16, 32)
    found: list[Case[PagesShape]] = []
    for scatter in (False, True):
        small = partial(shape_of, scatter=scatter)
        words = small(pool, torch.int32)
        found += [
            _case(words, pool, part),
            _case(small(pool, torch.int32, layer_first=True), pool, part),
            _case(words, pool, Part(layers=(0, 1), heads=(0, 2), tokens=(15, 16)), "one"),
            _case(words, pool, Part(layers=(0, 1), heads=(0, 2), tokens=(16, 48)), "whole"),
            _case(words, pool, Part(layers=(0, 3), heads=(0, 2), tokens=(7, 7)), "none"),
            _case(small((4, 1, 1, 1, 64, 288), torch.int32), (4, 1, 1, 1, 64, 288), _all_tokens(1, 1, 100), "latent"),
            _case(small((4, 2, 2, 1, 12, 5), torch.int16), (4, 2, 2, 1, 12, 5), _all_tokens(2, 1, 30), "odd"),
            _case(small((3, 1, 2, 2, 128, 6), torch.int8), (3, 1, 2, 2, 128, 6), _all_tokens(1, 2, 140), "bytes"),
        ]
        for dtype in FLOATS:
            found.append(_case(small(pool, dtype, payload=torch.float8_e4m3fn), pool, part))
        odd = (4, 2, 2, 1, 12, 5)
        for dtype, payload in permutations(FLOATS, 2):
            found.append(_case(small(pool, dtype, payload=payload), pool, part))
            found.append(_case(small(odd, dtype, payload=payload), odd, _all_tokens(2, 1, 30), "odd"))
        found += [_bench(page, scatter) for page in (16, 64)]
        found.append(_bench(64, scatter, torch.float32, torch.bfloat16))
    return found


def _all_tokens(layers: int, heads: int, tokens: int) -> Part:
    return Part(layers=(0, layers), heads=(0, heads), tokens=(0, tokens))


def _bench(
    page_tokens: int, scatter: bool, dtype: torch.dtype = torch.int32, payload: torch.dtype | None = None
) -> Case[PagesShape]:
    """8k tokens of an 8B model: 1 GiB."""
    pool: PoolShape = (8192 // page_tokens + 64, 32, 2, 8, page_tokens, 64)
    part = _all_tokens(32, 8, 8192)
    shape = shape_of(pool, dtype, payload=payload, scatter=scatter)
    return _case(shape, pool, part, "8b-t8192", bench=True, goal=0.85)


def _case(
    shape: PagesShape, pool: PoolShape, part: Part, what: str = "", *, bench: bool = False, goal: float | None = None
) -> Case[PagesShape]:
    order = "-layers" * (shape.strides[1] > shape.strides[0])
    name = f"{shape.label}-{str(shape.dtype).removeprefix('torch.')}{order}" + f"-{what}" * bool(what)
    made = partial(call, shape, pool, part)
    return Case(name=name, shape=shape, make=made, traffic=model(shape, part), bench=bench, goal=goal)


def _shapes(capabilities: Capabilities) -> Sequence[PagesShape]:
    """Pools of an 8B model, of one with small heads and of a latent cache."""
    found = [
        shape_of(pool, torch.int32, scatter=scatter)
        for pool in ((64, 32, 2, 8, 64, 64), (64, 32, 2, 8, 16, 64), (64, 24, 2, 2, 64, 32), (64, 60, 1, 1, 64, 288))
        for scatter in (False, True)
    ]
    pool = (64, 32, 2, 8, 64, 128)
    for dtype, payload, scatter in TRAVELS:
        found.append(shape_of(pool, dtype, payload=payload, scatter=scatter))
    if capabilities.fp8 is not None:
        found += [shape_of(pool, torch.bfloat16, payload=capabilities.fp8, scatter=way) for way in (False, True)]
    return found


FAMILY: Family[PagesShape, TorchPages | TritonPages] = Family(
    op="pages",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonPages, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchPages(shape)),
    ),
    shapes=_shapes,
    cases=cases,
)
