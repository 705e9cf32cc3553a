"""KV between dtypes: the rounding of each, in pieces, and on the calling thread alone."""

from __future__ import annotations

import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from baton_common.ids import PageId
from baton_kernels.quant import FP8_GROUP, fp8_groups
from baton_kvtransfer import PageLayout
from baton_kvtransfer.blocks import XXH3, HostBlocks, Seal, agreed_payload
from baton_kvtransfer.convert import CONVERTIBLE, PIECE, Cells, convert
from baton_kvtransfer.errors import LayoutMismatch
from baton_kvtransfer.plan import Block

FP8 = "float8_e4m3fn"
SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -65519.0, 1e-40, 3e38, float("inf"), float("nan")]


def into(values: torch.Tensor, dtype: str) -> Cells:
    """float32 [cells, dim], kept as `dtype` by `convert`."""
    source = Cells(values=values.contiguous())
    kept = torch.empty(values.shape, dtype=getattr(torch, dtype))
    target = Cells(values=kept, scales=np.zeros(len(values), np.float32) if dtype == FP8 else None)
    convert(source, target)
    return target


def back(cells: Cells) -> torch.Tensor:
    wide = Cells(values=torch.empty(cells.values.shape))
    convert(cells, wide)
    return wide.values


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for the payload of a NaN."""
    return torch.equal(torch.nan_to_num(one, nan=7.5), torch.nan_to_num(other, nan=7.5)) and torch.equal(
        one.signbit() & ~one.isnan(), other.signbit() & ~other.isnan()
    )


@pytest.mark.parametrize("count", [1, 7, PIECE // 16 + 1, 3 * PIECE // 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even_in_every_piece(dtype: str, count: int) -> None:
    values = torch.randn(count, 16) * 100
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    wanted = values.to(torch.bfloat16) if dtype == "bfloat16" else values.clamp(-65504, 65504).half()
    assert same(into(values, dtype).values.float(), wanted.float())
    assert same(back(into(values, dtype)), wanted.float())


@pytest.mark.parametrize("count", [1, 3, PIECE // FP8_GROUP + 1])
def test_8_bit_floats_are_those_of_the_kernels(count: int) -> None:
    values = torch.randn(count, FP8_GROUP) * torch.logspace(-6, 6, count).unsqueeze(1)
    values[0] = 0.0
    scales, codes = torch.empty(count, 1), torch.empty(count, FP8_GROUP, dtype=torch.float8_e4m3fn)
    fp8_groups(values, codes, scales)
    made = into(values, FP8)
    assert made.scales is not None
    assert torch.equal(torch.from_numpy(made.scales), scales.view(-1))
    assert torch.equal(made.values.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(back(made), codes.float() * scales)
    narrower = Cells(values=torch.empty(codes.shape, dtype=torch.bfloat16))
    convert(made, narrower)
    assert torch.equal(narrower.values, (codes.float() * scales).bfloat16())


@given(
    kept=st.sampled_from(CONVERTIBLE),
    payload=st.sampled_from(CONVERTIBLE),
    page_tokens=st.integers(1, 12),
    dim=st.sampled_from([1, 3, 4, 16]),
    tokens=st.tuples(st.integers(0, 30), st.integers(1, 18)),
    heads=st.sampled_from([(0, 3), (1, 2)]),
)
@settings(max_examples=80, deadline=None)
def test_any_block_crosses_as_any_dtype(
    kept: str, payload: str, page_tokens: int, dim: int, tokens: tuple[int, int], heads: tuple[int, int]
) -> None:
    """What was gathered and scattered as `payload` is what it was, as far as the narrower dtype holds it."""
    layout = PageLayout(layers=2, kv=2, heads=3, page_tokens=page_tokens, dim=dim, dtype=kept)
    count = 48
    exact = torch.randint(-7, 8, layout.shape(count)).float()  # whole numbers that every dtype holds
    exact[..., 0] = 7.0  # so that every factor is the same power of two, nearly
    scales = torch.ones(exact.shape[:-1]) if kept == FP8 else None
    source = exact.to(getattr(torch, kept))
    target, target_scales = torch.zeros_like(source), None if scales is None else torch.zeros_like(scales)
    block = Block(
        layer_begin=0, layer_end=2, head_begin=heads[0], head_end=heads[1], token_begin=tokens[0],
        token_end=sum(tokens),
    )  # fmt: skip
    pages = [PageId(page) for page in torch.randperm(count)[: -(-sum(tokens) // page_tokens)].tolist()]
    travels = PageLayout(layers=2, kv=2, heads=3, page_tokens=page_tokens, dim=dim, dtype=payload)
    bytes_ = memoryview(bytearray(block.bytes(travels)))
    ours = HostBlocks(source, layout, scales=scales).for_payloads(payload)
    theirs = HostBlocks(target, layout, scales=target_scales).for_payloads(payload)
    seal = Seal(XXH3, 5)
    digest = ours.gather(block, pages, bytes_, seal)
    assert digest == seal.over(bytes_), "over the bytes that travel"
    assert theirs.scatter(block, pages, bytes_, seal, digest=digest, shared=True)
    got = target.float() if target_scales is None else target.float() * target_scales.unsqueeze(-1)
    for position in range(tokens[0], sum(tokens)):
        cell = (pages[position // page_tokens], slice(None), slice(None), slice(*heads), position % page_tokens)
        assert torch.allclose(got[cell], exact[cell], rtol=2**-7, atol=2**-6)
        got[cell] = 0
    assert not bool(got.any()), "wrote outside the block"


def test_a_damaged_payload_is_not_converted() -> None:
    layout = PageLayout(layers=1, kv=2, heads=2, page_tokens=4, dim=8, dtype="float32")
    pool = torch.zeros(layout.shape(2))
    blocks = HostBlocks(pool, layout).for_payloads("bfloat16")
    block = Block(layer_begin=0, layer_end=1, head_begin=0, head_end=2, token_begin=0, token_end=4)
    payload = memoryview(bytearray(b"\x3f" * (4 * 2 * 2 * 8 * 2)))
    seal = Seal(XXH3, 5)
    assert not blocks.scatter(block, [PageId(1)], payload, seal, digest=seal.over(payload) ^ 1, shared=False)
    assert not bool(pool.any())


# ---- which dtype travels --------------------------------------------------------------------------------------------
ALL = {own: (own, *(dtype for dtype in CONVERTIBLE if dtype != own)) for own in CONVERTIBLE}


@pytest.mark.parametrize(
    ("sender", "receiver", "payload"),
    [
        (ALL["float32"], ALL["float32"], "float32"),
        (ALL["float32"], ALL["bfloat16"], "bfloat16"),
        (ALL["bfloat16"], ALL["float32"], "bfloat16"),
        (ALL["bfloat16"], ALL["float16"], "float16"),
        (ALL["bfloat16"], ALL[FP8], FP8),
        (ALL[FP8], ALL["bfloat16"], FP8),
        (("bfloat16",), ALL["float32"], "bfloat16"),  # a GPU sends, a host widens
        (("bfloat16",), ALL[FP8], "bfloat16"),  # it cannot narrow: the host does, at twice the bytes
        (ALL["float32"], ("bfloat16",), "bfloat16"),
        (("int8",), ("int8",), "int8"),
    ],
)
def test_the_narrower_pool_decides(sender: tuple[str, ...], receiver: tuple[str, ...], payload: str) -> None:
    assert agreed_payload(sender=sender, receiver=receiver) == payload


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [(("float32",), ("bfloat16",)), (("int8",), ALL["float32"]), ((), ALL["float32"]), (("float4",), ("float32",))],
)
def test_pools_without_a_common_payload_are_refused(sender: tuple[str, ...], receiver: tuple[str, ...]) -> None:
    with pytest.raises(LayoutMismatch) as refusal:
        agreed_payload(sender=sender, receiver=receiver)
    assert (refusal.value.field, refusal.value.ours) == ("kv_dtype", receiver[0])
    assert refusal.value.theirs == (sender[0] if sender else "")


def test_a_scaled_pool_needs_its_scales() -> None:
    layout = PageLayout(layers=1, kv=2, heads=2, page_tokens=4, dim=8, dtype=FP8)
    pool = torch.zeros(layout.shape(2)).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="needs float32 scales beside it"):
        HostBlocks(pool, layout)
    with pytest.raises(ValueError, match="needs no scales"):
        HostBlocks(
            torch.zeros(layout.shape(2)), PageLayout(layers=1, kv=2, heads=2, page_tokens=4, dim=8, dtype="float32"),
            scales=torch.ones(2, 1, 2, 2, 4),
        )  # fmt: skip


# ---- threads --------------------------------------------------------------------------------------------------------
THREADS = """
import os, threading, torch
from baton_kvtransfer import PageLayout
from baton_kvtransfer.blocks import XXH3, HostBlocks, Seal
from baton_kvtransfer.plan import Block
torch.set_num_threads(4)
layout = PageLayout(layers=8, kv=2, heads=8, page_tokens=64, dim=128, dtype="float32")
pool = torch.ones(layout.shape(4))
block = Block(layer_begin=0, layer_end=8, head_begin=0, head_end=8, token_begin=0, token_end=128)
counts = []
def work():
    counts.append(len(os.listdir("/proc/self/task")))
    for payload in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        wire = PageLayout(layers=8, kv=2, heads=8, page_tokens=64, dim=128, dtype=payload)
        out = memoryview(bytearray(block.bytes(wire)))
        blocks = HostBlocks(pool, layout).for_payloads(payload)
        digest = blocks.gather(block, [1, 2], out, Seal(XXH3, 1))
        assert blocks.scatter(block, [1, 2], out, Seal(XXH3, 1), digest=digest, shared=False)
    counts.append(len(os.listdir("/proc/self/task")))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*counts)
"""


def test_no_team_of_threads_is_started() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, timeout=120)
    before, after = done.stdout.split()
    assert before == after
