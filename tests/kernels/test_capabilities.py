"""What a device can do is data, by name or from the device."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch

from baton_common.errors import ConfigError
from baton_kernels.capabilities import CPU, NAMED, named, of_device


def test_a_name_stands_for_its_architecture():
    assert named("cpu") is CPU
    assert named("sm_90").matrix == "wgmma"
    assert named("sm_100").matrix == "tcgen05"
    assert named("gfx950").matrix == "mfma"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no device architecture 'sm_70'; use one of: cpu, sm_80, .*gfx950"):
        named("sm_70")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sm_80", None),
        ("sm_86", None),
        ("sm_90", torch.float8_e4m3fn),
        ("sm_100", torch.float8_e4m3fn),
        ("gfx942", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
        ("cpu", torch.float8_e4m3fn),
    ],
)
def test_8_bit_floats_have_the_encoding_of_the_device(name, dtype):
    assert named(name).fp8 is dtype


@pytest.mark.parametrize(
    ("name", "shared_bytes"), [("sm_90", 232448), ("sm_100", 232448), ("gfx942", 65536), ("gfx950", 163840)]
)
def test_shared_memory_is_the_vendors_limit(name, shared_bytes):
    assert named(name).shared_bytes == shared_bytes


@pytest.mark.parametrize("name", [name for name in NAMED if name != "cpu"])
def test_every_gpu_is_a_target_of_triton(name):
    target = named(name).target
    assert (target.backend, str(target.arch)) == (
        ("cuda", name.removeprefix("sm_")) if name.startswith("sm_") else ("hip", name)
    )
    assert target.warp_size == (32 if name.startswith("sm_") else 64)


def test_the_record_cannot_change():
    with pytest.raises(FrozenInstanceError):
        CPU.units = 2


def card(**found):
    return lambda _device: SimpleNamespace(name="a card", multi_processor_count=114, **found)


def test_a_device_that_is_here_brings_its_own_counts(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    found = card(major=9, minor=0, shared_memory_per_block_optin=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", found)
    capabilities = of_device(torch.device("cuda"))
    assert (capabilities.name, capabilities.units, capabilities.shared_bytes) == ("sm_90", 114, 1000)


def test_an_amd_device_goes_by_the_name_of_its_architecture_without_features(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", card(gcnArchName="gfx942:sramecc+:xnack-"))
    capabilities = of_device(torch.device("cuda"))
    assert (capabilities.name, capabilities.units, capabilities.shared_bytes) == ("gfx942", 114, 65536)


def test_a_device_that_is_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", card(major=7, minor=5))
    with pytest.raises(ConfigError, match=r"a card \(sm_75\) is not supported; supported are cpu, sm_80"):
        of_device(torch.device("cuda"))


def test_a_device_that_is_neither_cpu_nor_gpu_is_refused():
    assert of_device(torch.device("cpu")) is CPU
    with pytest.raises(ConfigError, match="not on 'meta'"):
        of_device(torch.device("meta"))
