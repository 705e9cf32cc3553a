"""Shared by all tests: one torch thread per process, because two busy OpenMP teams on two cores crawl; property tests
are not judged by the clock; and which GPU the tests marked `gpu` use, for how long those that draw at random.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("baton", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("baton")


def pytest_addoption(parser):
    parser.addoption("--gpu-device", default="cuda:0", help="for tests marked gpu; cpu shows what it can of them")
    parser.addoption("--stress-s", type=float, default=2.0, help="seconds of random cases in tests marked gpu")


@pytest.fixture(scope="session")
def gpu_device(request):
    """The torch device of tests marked `gpu`; skips where there is none."""
    import torch  # noqa: PLC0415 - tests of the router run without it

    device = torch.device(request.config.getoption("--gpu-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible to this process")
    return device
