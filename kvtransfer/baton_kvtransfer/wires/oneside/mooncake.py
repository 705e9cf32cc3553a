"""Mooncake's transfer engine: RDMA where there are devices, else its tcp protocol.

A chunk is a batch of its own, and few are under way per peer: its tcp protocol refuses batches of more than two
thousand pieces and then refuses that peer for ever. After two failures in a row an engine object is not used for that
peer again: its next link gets another one. What peers write into has an engine of its own, which that cannot touch.
An engine lives as long as the process: its destructor holds the interpreter lock for up to a second (measured), and an
idle one costs two threads and five descriptors.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from baton_kvtransfer.errors import PeerGone, WireError
from baton_kvtransfer.wires.oneside.engine import Region

MODULE = "mooncake.engine"

_ANNOUNCED = struct.Struct("<QQ")  # address, bytes; the segment's name follows
_LONGEST_NAME = 256
_ENVIRONMENT = {
    "MC_TRANSFER_TIMEOUT": "5",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "2",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",  # else every chunk connects, until no port is left
    "MC_LOG_LEVEL": "ERROR",
}
_TRIES = 2
_LANDED, _UNDER_WAY = 1, 0
_NO_BATCH = (0, 2**64 - 1)


def load() -> Callable[[], Any]:
    """The class of engines. Raises ImportError."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # it has no other door for these
    engine: Callable[[], Any] = importlib.import_module(MODULE).TransferEngine
    return engine


class MooncakeEngine:
    most_writes = 256

    def __init__(self, host: str, protocol: str, *, open_engine: Callable[[], Any] | None = None) -> None:
        """`host`: where peers reach this one. `protocol`: rdma or tcp. `open_engine` replaces the library's.

        Raises WireError.
        """
        self._host = host
        self._protocol = protocol
        try:
            self._open_engine = open_engine or load()
        except ImportError as error:
            raise WireError(f"Mooncake cannot start: {error}") from error
        self._landing: Any = None
        self._writing: list[Any] = []
        self._failed: set[tuple[int, str]] = set()  # (which of them, segment)

    def land(self, region: Region) -> bytes:
        if self._landing is None:
            self._landing = self._open()
        if self._landing.register_memory(region.address, region.bytes) != 0:
            raise WireError(f"Mooncake cannot register {region.bytes} bytes")
        segment = f"{self._host}:{self._landing.get_rpc_port()}"
        return _ANNOUNCED.pack(region.address, region.bytes) + segment.encode()

    def forget(self, region: Region) -> None:
        self._landing.unregister_memory(region.address)

    def reach(self, announced: bytes, staging: Region) -> MooncakeTarget:
        name = announced[_ANNOUNCED.size :]
        if not 0 < len(name) <= _LONGEST_NAME or not name.isascii():
            raise WireError("the peer's slots are not described as Mooncake does")
        address, size = _ANNOUNCED.unpack_from(announced)
        if size < staging.bytes:
            raise WireError(f"the peer announces {size} bytes for slots of {staging.bytes}")
        segment = name.decode()
        number = next(number for number in itertools.count() if (number, segment) not in self._failed)
        if number == len(self._writing):
            self._writing.append(self._open())
        failed = partial(self._failed.add, (number, segment))
        return MooncakeTarget(self._writing[number], segment, address, staging, failed)

    def close(self) -> None:
        """Nothing is left registered; see above."""

    def _open(self) -> Any:
        engine = self._open_engine()
        code = engine.initialize(self._host, "P2PHANDSHAKE", self._protocol, "")
        if code != 0:
            raise WireError(f"Mooncake cannot start with {self._protocol} on {self._host}: code {code}")
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        return engine


class MooncakeTarget:
    def __init__(self, engine: Any, segment: str, address: int, staging: Region, failed: Callable[[], None]) -> None:
        self.engine = engine
        self._failed = failed
        self._segment = segment
        self._address = address
        self._staging = staging
        if engine.register_memory(staging.address, staging.bytes) != 0:
            raise WireError(f"Mooncake cannot register {staging.bytes} bytes")

    def write(self, offset: int, size: int) -> MooncakeWrite:
        return MooncakeWrite(self, offset, size)

    def submit(self, offset: int, size: int) -> int:
        """The batch, or one of _NO_BATCH."""
        batch: int = self.engine.transfer_submit_write(
            self._segment, self._staging.address + offset, self._address + offset, size
        )
        return batch

    def failed(self) -> PeerGone:
        self._failed()
        return PeerGone(f"Mooncake cannot write to {self._segment}, tried {_TRIES} times", phase="send")

    def close(self) -> None:
        self.engine.unregister_memory(self._staging.address)


class MooncakeWrite:
    def __init__(self, target: MooncakeTarget, offset: int, size: int) -> None:
        self._target = target
        self._offset = offset
        self._size = size
        self._tries = 0
        self._batch = 0
        self._submit()

    def landed(self) -> bool:
        state = self._target.engine.transfer_check_status(self._batch)
        if state == _UNDER_WAY:
            return False
        if state != _LANDED:
            self._submit()
        return bool(state == _LANDED)

    def _submit(self) -> None:
        while self._tries < _TRIES:
            self._tries += 1
            self._batch = self._target.submit(self._offset, self._size)
            if self._batch not in _NO_BATCH:
                return
        raise self._target.failed()
