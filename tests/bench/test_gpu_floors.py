"""Floors of whole steps are those of the published table for an H200 (4.3 TB/s, 790 TFLOP/s, Llama-3.1-8B in bf16)."""

import pytest

from baton_kernels.registry import Traffic
from bench.gpu.ceilings import Ceilings
from bench.gpu.floors import decode_floor_s, kv_token_bytes, prefill_floor_s
from bench.models import LLAMA_3_1_8B

H200 = Ceilings(copy_gbps=4300.0, bf16_tflops=790.0)


@pytest.mark.parametrize(
    ("batch", "context", "expected_ms"),
    [(1, 1024, 3.52), (1, 16384, 3.99), (16, 4096, 5.51), (64, 1024, 5.57), (64, 16384, 35.5), (256, 1024, 13.2)],
)
def test_decode(batch, context, expected_ms):
    assert decode_floor_s(LLAMA_3_1_8B, batch, context, H200) * 1e3 == pytest.approx(expected_ms, rel=2e-3)


@pytest.mark.parametrize(("tokens", "expected_ms"), [(512, 9.13), (2048, 37.6), (8192, 167), (32768, 935)])
def test_prefill(tokens, expected_ms):
    assert prefill_floor_s(LLAMA_3_1_8B, tokens, H200) * 1e3 == pytest.approx(expected_ms, rel=3e-3)


def test_a_token_of_kv_takes_128_kib():
    assert kv_token_bytes(LLAMA_3_1_8B) == 131072


def test_the_larger_of_moving_and_computing_is_the_floor():
    assert H200.floor(Traffic(bytes=4_300_000, flops=0)) == (pytest.approx(1e-6), "mem")
    assert H200.floor(Traffic(bytes=4_300_000, flops=1_580_000_000)) == (pytest.approx(2e-6), "comp")
