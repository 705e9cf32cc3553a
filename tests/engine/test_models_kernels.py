"""What a decoder asks of the kernel library, and what is refused before weights are read."""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import tiny_checkpoint

from baton_common.errors import ConfigError
from baton_engine.exec.device import open_device
from baton_engine.models.kernels import decoder_shapes, parse_force
from baton_engine.models.loader import load_model, read_format
from baton_kernels import oracle
from baton_kernels.capabilities import named
from baton_kernels.library import Library
from baton_kernels.oracle import Unsupported


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


def test_every_use_of_a_kernel_has_one_shape(tmp_path):
    form = read_format(tiny_checkpoint("gemma2", tmp_path), dtype="bfloat16", kv_dtype="auto", native_bf16=True)
    shapes = decoder_shapes(form.spec, form.torch_dtype, form.layout(32))
    assert [family.op for family, _ in shapes] == ["rms_norm", "rms_norm", "rope_kv", "attention", "gated"]
    assert shapes.attention.softcap == 20.0
    assert shapes.attention.page_tokens == shapes.rope_kv.page_tokens == 32
    assert shapes.attention.kv_strides == shapes.rope_kv.kv_strides
    assert shapes.norm.wide
    assert shapes.gated.kind == "gelu_tanh"
    assert {oracle.choices(family, named("sm_90"), shape)[0].implementation for family, shape in shapes} == {"triton"}


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ({"head_dim": 24}, {}, "head size of 24"),
        ({}, {"page_tokens": 24}, "pages of 24 tokens"),
        ({}, {"dtype": "bfloat16", "kv_dtype": "float32"}, "KV of torch.float32 with queries of torch.bfloat16"),
    ],
)
def test_what_a_gpu_cannot_compute_is_refused_before_weights_are_read(overrides, settings, message, device, tmp_path):
    folder = tiny_checkpoint("qwen3", tmp_path, **overrides)
    seen = []
    gpu = replace(device, library=Library(named("sm_90")))
    with pytest.raises(Unsupported, match=message) as caught:
        load_model(folder, device=gpu, progress=lambda done, total: seen.append(done), **settings)
    assert "cannot run on sm_90" in str(caught.value)
    assert not seen


def test_a_cpu_computes_all_of_them(device, tmp_path):
    folder = tiny_checkpoint("qwen3", tmp_path, head_dim=24)
    model = load_model(folder, device=device, page_tokens=24)
    assert {choice.implementation for choice in device.library.choices} == {"torch"}
    assert device.library.fallbacks[("attention", "torch")] == 0
    assert model.decoder.dtype is torch.float32


def test_kernels_can_be_asked_for_by_name():
    assert parse_force("attention=torch, rms_norm=triton") == {"attention": "torch", "rms_norm": "triton"}
    assert parse_force("") == {}
    for text, message in (("attention", "write operation=name"), ("softmax=torch", "operations are .*attention")):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_force(text)
        assert caught.value.param == "kernels"
