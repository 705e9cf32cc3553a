"""KvPool: logical axes over any physical order, one dummy page, views that alias."""

import pytest
import torch

from baton_common.errors import ConfigError
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_kvtransfer.layout import AxisOrder, PageLayout


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


def layout(**changes):
    values = {"layers": 3, "kv": 2, "heads": 2, "page_tokens": 16, "dim": 8, "dtype": "float32"}
    return PageLayout(**(values | changes))


@pytest.mark.parametrize("order", list(AxisOrder))
def test_axes_are_logical_and_strides_follow_the_order(device, order):
    pool = KvPool(layout(order=order), 5, device)
    assert pool.tensor.shape == (6, 3, 2, 2, 16, 8)
    assert pool.tensor.stride() == pool.layout.strides(6)
    assert pool.dummy_page == 5
    assert not pool.tensor.any()


def test_one_page_is_one_contiguous_run_in_the_default_order(device):
    pool = KvPool(layout(), 4, device)
    assert pool.tensor[2].is_contiguous()
    assert pool.tensor[2].numel() * 4 == pool.layout.page_bytes


@pytest.mark.parametrize("order", list(AxisOrder))
def test_a_layer_is_a_view_of_the_pool(device, order):
    pool = KvPool(layout(order=order), 4, device)
    pool.layer(1)[3, 0, 1, 5] = 7.0
    assert pool.layer(1).shape == (5, 2, 2, 16, 8)
    assert (pool.tensor[3, 1, 0, 1, 5] == 7.0).all()
    assert pool.tensor.sum() == 7.0 * 8


def test_impossible_pools_are_refused_in_one_line(device):
    with pytest.raises(ConfigError, match="at least one page"):
        KvPool(layout(), 0, device)
    with pytest.raises(ConfigError, match=r"no memory for .* fewer pages"):
        KvPool(layout(), 10**15, device)
    with pytest.raises(ConfigError, match="int8"):
        KvPool(layout(dtype="int8"), 2, device)


def test_a_broken_device_is_not_taken_for_a_full_one(device, monkeypatch):
    def broken(*_, **__):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "frombuffer", broken)
    with pytest.raises(torch.AcceleratorError):
        KvPool(layout(), 2, device)


def test_the_pool_uses_the_dtype_of_its_layout(device):
    assert KvPool(layout(dtype="bfloat16"), 2, device).tensor.dtype == torch.bfloat16
