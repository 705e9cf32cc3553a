"""A GPU's stream and memory, on one that gets on only when told: fences, callbacks, failures, close, staging."""

import threading
from functools import partial

import numpy as np
import pytest
import support.engine_world
import torch
from support.checkpoints import tiny_checkpoint
from support.engine_world import engine_world, make_request, tiny_model
from support.fake_cuda import FakeCuda, fake_device
from support.table_runner import Table, runner_on, two_rows
from torch.overrides import TorchFunctionMode

from baton_common.clock import ManualClock
from baton_common.errors import BatonError, ConfigError
from baton_engine.exec import cuda as gpu
from baton_engine.exec.device import open_device
from baton_engine.request import Mode


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def device(cuda):
    device = fake_device(cuda)
    yield device
    cuda.reached = None
    device.close()


def test_work_is_queued_by_the_calling_thread_and_ends_when_the_device_gets_there(cuda, device):
    seen = []
    launch = device.stream.submit(
        lambda: seen.append((threading.current_thread(), torch.is_inference_mode_enabled(), cuda.is_current))
    )
    assert seen == [(threading.current_thread(), True, True)]
    assert not launch.done()
    assert not launch.fence.done()
    assert not launch.wait(0.005)
    with pytest.raises(BatonError, match="before it ended"):
        launch.result()
    cuda.reached = 2
    assert launch.wait(1.0)
    assert launch.fence.done()
    assert launch.result() is None


def test_time_is_the_devices_between_the_first_and_the_last_mark_of_a_launch(cuda, device):
    cuda.reached = None
    first, second = device.stream.submit(lambda: 1), device.stream.submit(cuda.mark)
    assert [launch.done() for launch in (first, second)] == [True, True]
    assert (first.elapsed_s, second.elapsed_s) == (1.0, 2.0)


def test_failed_work_ends_behind_what_it_had_queued_and_stops_nothing(cuda, device):
    bad, good = device.stream.submit(lambda: 1 // 0), device.stream.submit(lambda: "after")
    assert not bad.done()
    cuda.reached = None
    assert good.wait(1.0)
    assert bad.wait(1.0)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result() == "after"


def test_a_broken_device_ends_every_launch_with_its_error(cuda, device):
    heard = []
    queued = device.stream.submit(lambda: device.stream.after(lambda: heard.append("layers")))
    cuda.broken = torch.AcceleratorError("an illegal memory access was encountered")
    late = device.stream.submit(lambda: "never")
    for launch in (queued, late):
        assert launch.wait(1.0)
        assert launch.fence.done()
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            launch.result()
    device.close()
    assert heard == []


def test_a_callback_waits_for_its_mark_and_the_launch_for_the_callback(cuda, device):
    heard, gate = [], threading.Event()

    def second():
        assert gate.wait(5.0)
        heard.append(("second", threading.current_thread().name))

    def work():
        device.stream.after(lambda: heard.append(("first", threading.current_thread().name)))
        device.stream.after(second)

    launch = device.stream.submit(work)  # marks: begin, first, second, end
    assert not launch.wait(0.005)
    assert heard == []
    cuda.reached = 2
    assert not launch.wait(0.02)
    assert heard == [("first", "baton-device")]
    cuda.reached = None
    assert not launch.wait(0.02)
    gate.set()
    assert launch.wait(1.0)
    assert heard[1:] == [("second", "baton-device")]
    assert cuda.adopted == ["baton-device"]


def test_callbacks_of_many_launches_come_one_by_one_in_order(cuda, device):
    heard = []

    def work(number):
        for part in range(3):
            device.stream.after(partial(heard.append, (number, part)))

    launches = [device.stream.submit(partial(work, number)) for number in range(20)]
    cuda.reached = None
    assert all(launch.wait(5.0) for launch in launches)
    assert heard == [(number, part) for number in range(20) for part in range(3)]


def test_an_error_in_a_callback_is_that_launchs_and_ends_its_callbacks(cuda, device):
    heard = []

    def work(*callbacks):
        for callback in callbacks:
            device.stream.after(callback)

    bad = device.stream.submit(lambda: work(lambda: heard.append(1), lambda: 1 // 0, lambda: heard.append(3)))
    good = device.stream.submit(lambda: work(lambda: heard.append(4)))
    cuda.reached = None
    assert bad.wait(1.0)
    assert good.wait(1.0)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result() is None
    assert heard == [1, 4]


def test_close_lets_pending_callbacks_come_and_refuses_more(cuda, device):
    heard = []
    launch = device.stream.submit(lambda: device.stream.after(lambda: heard.append("layers")))
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join(0.02)
    assert closing.is_alive()
    cuda.reached = None
    closing.join(5.0)
    assert not closing.is_alive()
    assert heard == ["layers"]
    assert launch.done()
    device.close()
    with pytest.raises(BatonError, match="closed"):
        device.stream.submit(lambda: None)


def test_close_gives_a_device_up_that_hangs(cuda, device, monkeypatch):
    monkeypatch.setattr(gpu, "CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(gpu, "_LOOK_UP_S", 0.01)
    heard = []
    launch = device.stream.submit(lambda: device.stream.after(lambda: heard.append("layers")))
    device.close()
    cuda.reached = None
    assert launch.wait(1.0)
    with pytest.raises(BatonError, match="hung"):
        launch.result()
    assert heard == []


def test_a_run_waits_and_may_make_tensors_that_others_write(cuda, device):
    cuda.reached = None
    tensor = device.run(lambda: torch.zeros(2))
    tensor += 1
    assert tensor.tolist() == [1.0, 1.0]
    with pytest.raises(ZeroDivisionError):
        device.run(lambda: 1 // 0)


@pytest.mark.parametrize("needed_s", [0.0, 1e-4, 5e-3, 0.2])
def test_waiting_neither_burns_a_core_nor_oversleeps_much(needed_s):
    clock, pauses = ManualClock(), []

    def sleep(seconds):
        pauses.append(seconds)
        clock.advance(seconds)

    assert gpu.Patience(clock, sleep).until(lambda: clock.now() >= needed_s, 1.0)
    assert clock.now() <= needed_s * 1.07 + 4e-5
    assert len(pauses) < 300
    assert all(2e-5 <= pause <= 1e-3 for pause in pauses)


def test_an_upload_is_staged_and_a_download_has_its_own_memory(cuda, device):
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    tensor = device.upload(array)
    array[:] = 0
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    down = device.download(tensor)
    assert down.tolist() == tensor.tolist()
    assert down.data_ptr() != tensor.data_ptr()
    assert [pin.shape for pin in cuda.pins] == [(2, 3), (2, 3)]
    assert device.available_bytes() == 1 << 30


def test_weights_go_through_two_buffers_and_change_their_dtype_on_the_way(cuda, device, monkeypatch):
    monkeypatch.setattr(gpu, "STAGING_BYTES", 64)
    cuda.reached = None
    source = torch.randn(7, 11)
    target = torch.zeros(9, 11, dtype=torch.bfloat16)
    device.copy_in(target[1:8], source)
    assert torch.equal(target[1:8], source.to(torch.bfloat16))
    assert not target[[0, 8]].any()
    assert [pin.numel() for pin in cuda.pins] == [64, 64]
    with torch.inference_mode():
        device.copy_in(target[1:8], source + 1)
    device.copy_in(target[1:8], source)
    assert torch.equal(target[1:8], source.to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="view"):
        device.copy_in(torch.zeros(4, 4)[:, :2], torch.zeros(4, 2))


def test_a_staging_buffer_is_filled_again_only_when_the_device_has_read_it(cuda, device, monkeypatch):
    monkeypatch.setattr(gpu, "STAGING_BYTES", 64)
    target, source = torch.zeros(64), torch.arange(64.0)  # four parts
    loading = threading.Thread(target=device.copy_in, args=(target, source))
    loading.start()
    loading.join(0.02)
    assert loading.is_alive()
    assert cuda.marks == 2
    cuda.reached = 1
    loading.join(0.02)
    assert cuda.marks == 3
    cuda.reached = None
    loading.join(5.0)
    assert torch.equal(target, source)


def test_a_device_that_takes_no_copies_is_an_error(device, monkeypatch):
    monkeypatch.setattr(gpu, "STAGING_BYTES", 64)
    monkeypatch.setattr(gpu, "_COPY_TIMEOUT_S", 0.01)
    with pytest.raises(BatonError, match="hangs"):
        device.copy_in(torch.zeros(64), torch.zeros(64))


@pytest.mark.parametrize(
    ("name", "built", "count", "told"),
    [
        ("cuda", False, 0, r"built without GPU support; install .* or use --device cpu"),
        ("cuda", True, 0, r"no GPU is visible.*CUDA_VISIBLE_DEVICES, or use --device cpu"),
        ("cuda:1", True, 1, r"no cuda:1: .* 1 GPUs, cuda:0 only"),
        ("cuda:8", True, 8, r"no cuda:8: .* 8 GPUs, cuda:0 to cuda:7"),
        ("cuda:x", True, 8, r"no device 'cuda:x'.*cpu, cuda"),
        ("cpu:1", True, 8, r"use --device cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(monkeypatch, name, built, count, told):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=told) as caught:
        open_device(name)
    assert caught.value.param == "device"


def test_layers_are_reported_when_the_device_has_computed_them_not_when_they_are_queued(cuda, device):
    cuda.reached = None
    runner = runner_on(device)
    cuda.reached = cuda.marks + 2  # the begin of the step and its first group
    heard, plan = [], two_rows(temperature=0.0)
    handle = runner.launch(plan, lambda *what: heard.append(what))
    with pytest.raises(BatonError, match="did not end"):
        handle.collect(0.02)
    assert heard == [(plan, 0, 2)]
    assert not handle.fence.done()
    cuda.reached = None
    result = handle.collect(1.0)
    assert heard == [(plan, 0, 2), (plan, 2, 4)]
    assert result.tokens == Table.rows[[3, 8]].argmax(-1).tolist()
    assert result.elapsed_s == 3.0


HOST_READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "masked_select"}


class HostReads(TorchFunctionMode):
    """Notes the calls for which a host would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        flags = [one for one in (index if isinstance(index, tuple) else (index,)) if is_flags(one)]
        if name in HOST_READS or flags:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def is_flags(index):
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


@pytest.mark.parametrize(
    ("sampling", "reads"),
    [
        ({"temperature": 0.0}, set()),
        ({"temperature": 1.0, "seed": 5}, set()),
        ({"temperature": 0.0, "logprobs": True, "top_logprobs": 3}, set()),
        ({"temperature": 0.7, "presence_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {4: 1.0}}, set()),
        ({"temperature": 0.7, "min_tokens": 2, "stop_token_ids": frozenset({5})}, set()),
        # The reference of truncation looks whether some row needs a whole sort.
        ({"temperature": 0.7, "top_k": 4}, {"__bool__"}),
    ],
)
def test_a_step_never_reads_what_the_device_computes(sampling, reads):
    mode = HostReads()
    cuda = FakeCuda(reached=None)
    device = fake_device(cuda)
    runner = runner_on(device)
    cuda._watch = lambda: mode
    runner.launch(two_rows(**sampling), None).collect(1.0)
    device.close()
    assert mode.seen == reads


def test_an_engine_on_a_gpu_makes_the_tokens_of_one_on_a_cpu(tmp_path, monkeypatch):
    model = tiny_model(tiny_checkpoint("qwen3", tmp_path, num_hidden_layers=5))

    def outputs():
        options = [
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 2},
            {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 4},
        ]
        with engine_world(model, layer_group=2) as world:
            tokens = world.run(make_request([5, 9, n, 30], max_tokens=12, **one) for n, one in enumerate(options))
            sent = make_request(list(range(40)), mode=Mode.PREFILL)
            world.submit(sent)
            world.role.wait(lambda: "on_prefill_done" in world.role.names(sent.request_id))
            world.engine.handoff_done(sent.request_id)
            world.wait(sent)
            layers = [what[3:] for what in world.role.hooks if what[0] == "on_layers"]
        return tokens, layers

    expected = outputs()
    assert expected[1] == [(0, 2), (2, 4), (4, 5)]
    monkeypatch.setattr(support.engine_world, "open_device", lambda *_, **__: fake_device(FakeCuda(reached=None)))
    assert outputs() == expected
