"""The Mooncake store: pages in the memory of many machines, found through its master.

The master may evict what it likes and leases what was read; a page whose holder died is gone. All of that is a miss.
What the store reads and writes is a frame of our own, never the host pool: its transfers cannot be told to stop, and
bytes that come late must find nobody's page. The copy out of that frame is what gets verified.
Two calls of its client hold the interpreter lock (measured): `setup`, for 90 s when the master does not answer, so a
child process tries it first; and `close`, for up to 11 s, so neither that nor the destructor is ever called: the client
ends with the process, and its master takes the segment back after the client's time to live.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from baton_kvtransfer.errors import WireError
from baton_kvtransfer.tiers.frames import TierKey
from baton_kvtransfer.tiers.tier import TierFault
from baton_kvtransfer.wires.oneside import mooncake as engine

MODULE = "mooncake.store"

_LOCAL_BUFFER_BYTES = 16 << 20
_TRY_S = 10.0
_TRY = f"""
import os, sys
from {MODULE} import MooncakeDistributedStore
host, protocol, master = sys.argv[1:]
code = MooncakeDistributedStore().setup(host, "P2PHANDSHAKE", 0, {_LOCAL_BUFFER_BYTES}, protocol, "", master)
os._exit(1 if code else 0)
"""
_HERE = 1
_MISSES = (-704, -707)  # no such key; its lease ended while it was read, so somebody else's page may be there
_HOLDER_GONE = -800  # and its master has not noticed yet
_REFUSED = (-200, _HOLDER_GONE)  # no room
_LOST = (-600, _HOLDER_GONE)  # larger than a frame


def load() -> Callable[[], Any]:
    """The class of its clients. Raises WireError."""
    try:
        engine.load()  # sets what both read from the environment
        store: Callable[[], Any] = importlib.import_module(MODULE).MooncakeDistributedStore
    except ImportError as error:
        raise WireError(
            f"the mooncake tier needs a library that cannot be loaded ({error}); pip install 'baton[mooncake]'"
        ) from error
    return store


def is_loaded() -> bool:
    return MODULE in sys.modules


class MooncakeTier:
    name = "mooncake"

    def __init__(self, master: str, *, host: str, protocol: str, segment_bytes: int, frame_bytes: int) -> None:
        """`host`: where others reach this process. `segment_bytes`: memory that it lends to the store.

        Raises WireError when the library is missing; a master that does not answer is no error, now or later.
        """
        self._master = master
        self._host = host
        self._protocol = protocol
        self._segment_bytes = segment_bytes
        self._new_store = load()
        self._store: Any = None
        self._frame = memoryview(mmap.mmap(-1, frame_bytes))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._frame))

    @property
    def bytes(self) -> int:
        return self._segment_bytes

    def open(self) -> None:
        self._try()
        store = self._new_store()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        code = store.setup(
            self._host,
            "P2PHANDSHAKE",
            self._segment_bytes,
            _LOCAL_BUFFER_BYTES,
            self._protocol,
            "",
            self._master,
        )
        if code or store.register_buffer(self._address, self._frame.nbytes):
            raise TierFault(f"the store cannot start with {self._protocol} on {self._host}: code {code}")
        self._store = store

    def has(self, keys: Sequence[TierKey]) -> int:
        codes = self._store.batch_is_exist([_name(key) for key in keys])
        for count, code in enumerate(codes):
            if code < 0:
                raise self._fault("asked", code)
            if code != _HERE:
                return count
        return len(keys)

    def put(self, key: TierKey, frame: memoryview) -> bool:
        self._frame[:] = frame
        code = self._store.put_from(_name(key), self._address, frame.nbytes)
        if code and code not in _REFUSED:
            raise self._fault("written to", code)
        return bool(code == 0)

    def get(self, key: TierKey, out: memoryview) -> int:
        size: int = self._store.get_into(_name(key), self._address, out.nbytes)
        if size in _LOST:
            self.delete(key)
            return 0
        if size < 0 and size not in _MISSES:
            raise self._fault("read from", size)
        out[:] = self._frame
        return max(size, 0)

    def delete(self, key: TierKey) -> None:
        self._store.remove(_name(key), True)

    def close(self) -> None:
        """See above."""

    def _try(self) -> None:
        command = [sys.executable, "-c", _TRY, self._host, self._protocol, self._master]
        try:
            subprocess.run(command, capture_output=True, timeout=_TRY_S, check=True)
        except subprocess.SubprocessError:
            raise TierFault(f"the store at {self._master} does not answer") from None

    def _fault(self, call: str, code: int) -> TierFault:
        return TierFault(f"the store at {self._master} cannot be {call}: code {code}")


def _name(key: TierKey) -> str:
    return f"baton/{key.hex()}"
