"""What a device can do, as data: asked of the device itself, or looked up by the name of its architecture.

Everything that chooses or compiles a kernel reads this record and nothing else, so that each decision can be made,
tested and explained on a machine that does not have the device. It does not know operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from baton_common.errors import ConfigError
from baton_kernels.rt.language import TRITON_VERSION

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

Vendor = Literal["cpu", "nvidia", "amd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """One kind of device, with the Triton that would compile for it."""

    name: str  # "sm_90", "gfx950", "cpu"
    vendor: Vendor
    family: str  # what configurations are shared by: ampere, ada, hopper, blackwell, cdna3, cdna4, cpu
    units: int  # streaming multiprocessors or compute units
    shared_bytes: int  # that one program may use
    warp: int  # threads
    fp8: torch.dtype | None  # e4m3 in the device's own encoding
    matrix: str  # widest matrix instruction: mma, wgmma, tcgen05, mfma
    descriptors: bool  # tensor descriptors become bulk copies in hardware
    native_bf16: bool = True
    triton: tuple[int, int] | None = TRITON_VERSION  # None: not installed

    @property
    def target(self) -> GPUTarget:
        """For Triton's compiler. Not for a CPU."""
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - absent where there is no Triton

        if self.vendor == "nvidia":
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), self.warp)
        assert self.vendor == "amd", "a CPU is no target"
        return GPUTarget("hip", self.name, self.warp)


def _nvidia(
    name: str, family: str, units: int, shared_kib: int, matrix: str, *, fp8: bool = True, descriptors: bool = False
) -> Capabilities:
    return Capabilities(
        name=name,
        vendor="nvidia",
        family=family,
        units=units,
        shared_bytes=shared_kib * 1024,
        warp=32,
        fp8=torch.float8_e4m3fn if fp8 else None,
        matrix=matrix,
        descriptors=descriptors,
    )


def _amd(name: str, family: str, units: int, shared_kib: int, fp8: torch.dtype) -> Capabilities:
    return Capabilities(
        name=name,
        vendor="amd",
        family=family,
        units=units,
        shared_bytes=shared_kib * 1024,
        warp=64,
        fp8=fp8,
        matrix="mfma",
        descriptors=False,
    )


CPU = Capabilities(
    name="cpu",
    vendor="cpu",
    family="cpu",
    units=1,
    shared_bytes=0,
    warp=1,
    fp8=torch.float8_e4m3fn,
    matrix="",
    descriptors=False,
)

NAMED: Mapping[str, Capabilities] = {
    one.name: one
    for one in (
        CPU,
        _nvidia("sm_80", "ampere", 108, 163, "mma", fp8=False),
        _nvidia("sm_86", "ampere", 84, 99, "mma", fp8=False),
        _nvidia("sm_89", "ada", 128, 99, "mma"),
        _nvidia("sm_90", "hopper", 132, 227, "wgmma", descriptors=True),
        _nvidia("sm_100", "blackwell", 148, 227, "tcgen05", descriptors=True),
        _nvidia("sm_103", "blackwell", 148, 227, "tcgen05", descriptors=True),
        _nvidia("sm_120", "ada", 170, 99, "mma"),
        _amd("gfx942", "cdna3", 304, 64, torch.float8_e4m3fnuz),
        _amd("gfx950", "cdna4", 256, 160, torch.float8_e4m3fn),
    )
}
"""Vendor limits, not read off a device; H200, B200, MI300X and MI355X stand for their architectures."""


def named(name: str) -> Capabilities:
    """By architecture. ConfigError for a name that is not in the table."""
    found = NAMED.get(name)
    if found is None:
        raise ConfigError(f"no device architecture {name!r}; use one of: {', '.join(NAMED)}", param="device")
    return found


def of_device(device: torch.device) -> Capabilities:
    """Of a device that is here: its architecture by name, its own count of units and shared memory.

    ConfigError for a GPU whose architecture is not in the table.
    """
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ConfigError(f"kernels run on cpu and cuda devices, not on {device.type!r}", param="device")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    if name not in NAMED:
        raise ConfigError(
            f"{properties.name} ({name}) is not supported; supported are {', '.join(NAMED)}", param="device"
        )
    shared = getattr(properties, "shared_memory_per_block_optin", NAMED[name].shared_bytes)
    return replace(NAMED[name], units=properties.multi_processor_count, shared_bytes=shared)
