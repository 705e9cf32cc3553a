"""Device: launches run in order off the calling thread, and report their end, their value or their error."""

import threading

import pytest
import torch

from baton_common.clock import ManualClock
from baton_common.errors import BatonError, ConfigError
from baton_engine.exec.device import open_device


@pytest.fixture
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


def test_launches_run_in_order_on_one_other_thread(device):
    seen = []
    launches = [device.stream.submit(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(50)]
    assert launches[-1].wait(5.0)
    assert all(launch.done() and launch.fence.done() for launch in launches)
    assert seen == [(i, "baton-device") for i in range(50)]


def test_a_launch_gives_its_value(device):
    launch = device.stream.submit(lambda: torch.ones(3).sum().item())
    assert launch.wait(5.0)
    assert launch.result() == 3.0


def test_work_runs_in_inference_mode(device):
    launch = device.stream.submit(torch.is_inference_mode_enabled)
    assert launch.wait(5.0)
    assert launch.result() is True


def test_what_a_run_makes_may_be_written_by_other_threads(device):
    assert device.run(threading.current_thread).name == "baton-device"
    tensor = device.run(lambda: torch.zeros(2))
    tensor += 1
    assert tensor.tolist() == [1.0, 1.0]


def test_a_callback_comes_at_once_and_its_error_ends_the_work(device):
    seen = []

    def work():
        device.stream.after(lambda: seen.append(threading.current_thread().name))
        seen.append("then")
        device.stream.after(lambda: 1 // 0)
        seen.append("never")

    launch = device.stream.submit(work)
    assert launch.wait(5.0)
    assert seen == ["baton-device", "then"]
    with pytest.raises(ZeroDivisionError):
        launch.result()


def test_a_launch_knows_how_long_it_ran():
    clock = ManualClock()
    device = open_device("cpu", threads=1, clock=clock)
    gate = threading.Event()
    first = device.stream.submit(lambda: gate.wait(5.0) and clock.advance(3.0))
    second = device.stream.submit(lambda: clock.advance(0.5))
    gate.set()
    assert second.wait(5.0)
    assert (first.elapsed_s, second.elapsed_s) == (3.0, 0.5)
    device.close()


def test_an_error_of_a_run_comes_out_of_it(device):
    with pytest.raises(ZeroDivisionError):
        device.run(lambda: 1 // 0)


def test_a_wait_ends_at_its_deadline_and_a_fence_stays_false_until_the_work_ends(device):
    gate = threading.Event()
    launch = device.stream.submit(lambda: gate.wait(5.0))
    assert not launch.wait(0.01)
    assert not launch.fence.done()
    with pytest.raises(BatonError, match="before it ended"):
        launch.result()
    gate.set()
    assert launch.wait(5.0)
    assert launch.fence.done()
    assert launch.wait(0.0)


def test_an_error_is_raised_again_by_its_own_launch_only(device):
    bad = device.stream.submit(lambda: 1 // 0)
    good = device.stream.submit(lambda: "after")
    assert good.wait(5.0)
    assert bad.done()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result() == "after"


def test_close_lets_queued_work_end_and_refuses_more():
    device = open_device("cpu", threads=1)
    launches = [device.stream.submit(lambda i=i: i) for i in range(20)]
    device.close()
    device.close()
    assert [launch.result() for launch in launches] == list(range(20))
    with pytest.raises(BatonError, match="closed"):
        device.stream.submit(lambda: None)


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no device 'tpu'.*cpu"):
        open_device("tpu")


def test_the_compute_team_has_the_size_asked_for():
    device = open_device("cpu", threads=1)
    launch = device.stream.submit(torch.get_num_threads)
    assert launch.wait(5.0)
    assert launch.result() == 1
    device.close()
