"""A real GPU as a device: order, staging, no wait inside a step, and the tokens of the CPU."""

import time

import numpy as np
import pytest
import support.engine_world
import torch
from support.checkpoints import tiny_checkpoint
from support.engine_world import engine_world, make_request, tiny_model
from support.table_runner import Table, runner_on, two_rows

from baton_common.errors import ConfigError
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_engine.models.loader import load_model
from baton_kvtransfer.layout import PageLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to this process"),
]

LONG_CYCLES = 200_000_000  # about a tenth of a second


@pytest.fixture(scope="module")
def device():
    device = open_device("cuda")
    yield device
    device.close()


def test_a_launch_returns_before_the_device_is_done_and_knows_how_long_it_took(device):
    device.run(lambda: torch.cuda._sleep(1000))
    began_s = time.monotonic()
    launch = device.stream.submit(lambda: torch.cuda._sleep(LONG_CYCLES))
    assert not launch.done()
    assert launch.wait(30.0)
    assert 0.0 < launch.elapsed_s <= time.monotonic() - began_s


def test_a_callback_sees_what_the_kernels_before_it_wrote(device):
    flag, seen = device.run(lambda: torch.zeros(1, device=device.torch_device)), []

    def work():
        for value in (1.0, 2.0):
            torch.cuda._sleep(LONG_CYCLES // 10)
            flag.fill_(value)
            copy = flag.clone()
            device.stream.after(lambda copy=copy: seen.append((copy.item(), torch.cuda.current_device())))

    launch = device.stream.submit(work)
    assert launch.wait(30.0)
    launch.result()
    index = device.torch_device.index
    assert seen == [(1.0, index), (2.0, index)]


def test_staging_memory_is_not_reused_while_a_copy_is_on_its_way(device):
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 1 << 40, 1000) for _ in range(300)]
    device.stream.submit(lambda: torch.cuda._sleep(LONG_CYCLES))
    tensors = [device.upload(array) for array in arrays]
    launch = device.stream.submit(lambda: [device.download(tensor + 1) for tensor in tensors])
    assert launch.wait(30.0)
    assert all((host.numpy() == array + 1).all() for host, array in zip(launch.result(), arrays, strict=True))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_many_staging_buffers_arrive_whole(device, stored):
    source = torch.randn(90_001, 1024).to(stored)
    target = device.run(lambda: torch.zeros(90_003, 1024, dtype=torch.bfloat16, device=device.torch_device))
    device.run(lambda: device.copy_in(target[1:-1], source))
    host = target.cpu()
    assert torch.equal(host[1:-1], source.to(torch.bfloat16))
    assert not host[[0, -1]].any()


def test_a_pool_that_does_not_fit_is_refused(device):
    layout = PageLayout(layers=3, kv=2, heads=2, page_tokens=16, dim=8, dtype="float32")
    too_many = 2 * device.available_bytes() // layout.page_bytes
    with pytest.raises(ConfigError, match=r"no memory for .* fewer pages"):
        KvPool(layout, too_many, device)
    assert KvPool(layout, 4, device).tensor.device == device.torch_device


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": True, "top_logprobs": 3},
        {"temperature": 0.7, "presence_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {4: 1.0}},
    ],
)
def test_queueing_a_step_never_waits_for_the_device(device, sampling):
    runner_on(device).launch(two_rows(**sampling), None).collect(30.0)
    runner = runner_on(device)
    device.stream.submit(lambda: torch.cuda._sleep(LONG_CYCLES))
    torch.cuda.set_sync_debug_mode("error")
    try:
        handle = runner.launch(two_rows(**sampling), lambda *_: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not handle.fence.done()
    tokens = handle.collect(30.0).tokens
    if sampling == {"temperature": 0.0}:
        assert tokens == Table.rows[[3, 8]].argmax(-1).tolist()


def test_an_engine_makes_the_tokens_of_one_on_a_cpu(tmp_path, monkeypatch, device):
    folder = tiny_checkpoint("qwen3", tmp_path)

    def outputs(model):
        with engine_world(model) as world:
            return world.run(make_request([5, 9, n, 30], max_tokens=16) for n in range(4))

    expected = outputs(tiny_model(folder))
    monkeypatch.setattr(support.engine_world, "open_device", lambda *_, **__: open_device("cuda"))
    assert outputs(load_model(folder, device=device, dtype="float32")) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_is_used_alone():
    second = open_device("cuda:1")
    tensor = second.run(lambda: torch.zeros(4, device="cuda"))
    assert tensor.device == second.torch_device == torch.device("cuda", 1)
    second.close()
