"""Which wires this side has, and why not the others. Asked by the transport, and by `baton explain`.

`auto` offers what is sure to be good: shm on one host, nixl where there is RDMA, tcp always. Mooncake is only taken by
name, and so is nixl without RDMA, where it is slower than tcp. A library is loaded when its wire is offered.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.errors import WireError
from baton_kvtransfer.wires import Wire
from baton_kvtransfer.wires.oneside import mooncake, nixl
from baton_kvtransfer.wires.oneside.wire import OnesideWire
from baton_kvtransfer.wires.shm import ShmWire
from baton_kvtransfer.wires.tcp import TcpWire

WIRES = ("shm", "nixl", "mooncake", "tcp")
"""Preferred first."""

RDMA_DEVICES = Path("/dev/infiniband")
_SYSTEM_PACKAGES = "libibverbs1 libnuma1 libcurl4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Wires that are offered, preferred first; and why others are not, one line each."""

    wires: Mapping[str, Wire]
    skipped: Mapping[str, str]


def host_id() -> str:
    """ "" where the system cannot tell, or cannot share memory this way; then shm is not used."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
    return hashlib.blake2b(f"{boot}/{namespace}".encode(), digest_size=8).hexdigest()


def has_rdma(devices: Path = RDMA_DEVICES) -> bool:
    """Can this process open an RDMA device? (/sys shows those of the node also to containers that were given none.)"""
    return any(os.access(device, os.R_OK | os.W_OK) for device in devices.glob("uverbs*"))


def skipped(wire: str, *, rdma: bool) -> str:
    """Why `auto` leaves that wire out; empty = it offers it. Loads nothing."""
    if wire == "shm":
        return "" if host_id() else "this system has no shared memory for it"
    if wire == "nixl":
        if not any(find_spec(name) for name in nixl.MODULES):
            return "its library is not installed; pip install 'baton[nixl]'"
        return "" if rdma else "no RDMA device here"
    return "it is only taken by name" if wire == "mooncake" else ""


def choose(config: TransferConfig, *, rdma: bool) -> Choice:
    """Raises WireError when the wire that is insisted on cannot be had."""
    makers: Mapping[str, Callable[[], Wire]] = {
        "shm": ShmWire,
        "tcp": TcpWire,
        "nixl": partial(_nixl, config),
        "mooncake": partial(_mooncake, config, rdma),
    }
    if config.wire != "auto":
        if config.wire == "shm" and not host_id():
            raise WireError("wire is set to shm, but this system has no shared memory for it; use auto or tcp")
        return Choice(wires={config.wire: makers[config.wire]()}, skipped={})
    wires: dict[str, Wire] = {}
    reasons: dict[str, str] = {}
    for name in WIRES:
        if reason := skipped(name, rdma=rdma):
            reasons[name] = reason
            continue
        try:
            wires[name] = makers[name]()
        except WireError as error:
            reasons[name] = error.message
    return Choice(wires=wires, skipped=reasons)


def _nixl(config: TransferConfig) -> Wire:
    try:
        nixl.load()
    except ImportError as error:
        raise _missing("nixl", error) from error
    return OnesideWire("nixl", nixl.NixlEngine, limit_s=config.connect_timeout_s)


def _mooncake(config: TransferConfig, rdma: bool) -> Wire:
    try:
        mooncake.load()
    except ImportError as error:
        raise _missing("mooncake", error) from error
    host = config.advertise or config.listen.rpartition(":")[0].strip("[]")
    engine = partial(mooncake.MooncakeEngine, host, "rdma" if rdma else "tcp")
    return OnesideWire("mooncake", engine, limit_s=config.connect_timeout_s)


def _missing(wire: str, error: ImportError) -> WireError:
    return WireError(
        f"the {wire} wire needs a library that cannot be loaded ({error}); pip install 'baton[{wire}]', and on Debian "
        f"apt-get install {_SYSTEM_PACKAGES}"
    )
