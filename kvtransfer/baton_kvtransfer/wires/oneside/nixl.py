"""NIXL's UCX back end as an engine: RDMA, NVLink (cuda_ipc), cma or tcp, as UCX finds devices and memory.

One agent per endpoint, under a name that is never used again: a peer that comes back is another agent, and what was
registered with the old one reaches nobody. The library's Python class is passed by because it fixes the pause of the
progress thread at 0, which burns a core (measured) and delays everything else.
Do not load it in a process that loads grpc_tools: one of the two crashes.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import struct
import sys
from types import ModuleType
from typing import Any

from baton_kvtransfer.errors import KVTransferError, PeerGone, WireError
from baton_kvtransfer.wires.oneside.engine import HOST, Region

MODULES = ("nixl_cu13", "nixl_cu12")
"""One per CUDA release; without a GPU they are equal."""

_PROGRESS_PAUSE_US = 1000
_ANNOUNCED = struct.Struct("<QQi")  # address, bytes, device; NIXL's own description follows


def load() -> ModuleType:
    """The bindings. Raises ImportError."""
    failures = []
    for name in MODULES:
        try:
            return importlib.import_module(f"{name}._bindings")
        except ImportError as error:
            failures.append(str(error))
    raise ImportError("; ".join(failures))


def is_loaded() -> bool:
    return any(f"{name}._bindings" in sys.modules for name in MODULES)


class NixlEngine:
    most_writes = 1024

    def __init__(self) -> None:
        """Raises WireError."""
        try:
            self.library: Any = load()
            config = self.library.nixlAgentConfig()
            # without a progress thread a peer's write never ends, not even over shared memory: its flush waits for us
            config.useProgThread = True
            config.pthrDelay = _PROGRESS_PAUSE_US
            config.useListenThread = False
            config.syncMode = self.library.NIXL_THREAD_SYNC_NONE  # one thread, the pump
            self.agent: Any = self.library.nixlAgent(f"baton-{secrets.token_hex(8)}", config)
            parameters, _ = self.agent.getPluginParams("UCX")
            self.backend = self.agent.createBackend("UCX", parameters)
        except Exception as error:  # the library has no common base for its errors
            raise WireError(f"NIXL cannot start: {error}") from error
        self._links: dict[str, int] = {}  # by remote agent

    def land(self, region: Region) -> bytes:
        try:
            descriptors = self.register(region)
            described: bytes = self.agent.getLocalPartialMD(descriptors, True, [self.backend])
        except Exception as error:
            raise WireError(f"NIXL cannot register {region.bytes} bytes: {error}") from error
        return _ANNOUNCED.pack(region.address, region.bytes, region.device) + described

    def forget(self, region: Region) -> None:
        self.agent.deregisterMem(self._registration(region), [self.backend])

    def register(self, region: Region) -> Any:
        if region.device != HOST:
            torch = importlib.import_module("torch")
            torch.cuda.set_device(region.device)  # UCX registers in the context of the calling thread
        descriptors = self._registration(region)
        self.agent.registerMem(descriptors, [self.backend])
        return descriptors

    def reach(self, announced: bytes, staging: Region) -> NixlTarget:
        if len(announced) < _ANNOUNCED.size:
            raise WireError("the peer's slots are not described as NIXL does")
        address, size, device = _ANNOUNCED.unpack_from(announced)
        if size < staging.bytes:
            raise WireError(f"the peer announces {size} bytes for slots of {staging.bytes}")
        try:
            name = self.agent.loadRemoteMD(announced[_ANNOUNCED.size :]).decode()
        except Exception as error:
            raise WireError(f"NIXL does not accept the peer's description of its slots: {error}") from error
        self._links[name] = self._links.get(name, 0) + 1
        remote = Region(address=address, bytes=size, device=device)
        target = NixlTarget(self, name, staging, remote)
        try:
            self.register(staging)
            self.agent.makeConnection(name, [self.backend])  # or the first chunk would pay for it
        except Exception as error:
            target.close()
            raise self.failure(error) from error
        return target

    def part(self, name: str) -> None:
        """Another link to that agent may still be open; the last one forgets it, so that the next starts afresh."""
        self._links[name] -= 1
        if not self._links[name]:
            del self._links[name]
            with contextlib.suppress(Exception):  # it forgets agents that died by itself
                self.agent.invalidateRemoteMD(name)

    def descriptors(self, region: Region, offset: int, size: int) -> Any:
        entry = (region.address + offset, size, max(0, region.device))
        return self.library.nixlXferDList(self._segment(region), [entry])

    def failure(self, error: Exception) -> KVTransferError:
        if isinstance(error, self.library.nixlRemoteDisconnectError):
            return PeerGone(f"NIXL lost the peer: {error}", phase="send")
        return WireError(f"NIXL: {error}", phase="send")

    def close(self) -> None:
        self.agent = None

    def _registration(self, region: Region) -> Any:
        entry = (region.address, region.bytes, max(0, region.device), "")
        return self.library.nixlRegDList(self._segment(region), [entry])

    def _segment(self, region: Region) -> Any:
        return self.library.DRAM_SEG if region.device == HOST else self.library.VRAM_SEG


class NixlTarget:
    def __init__(self, engine: NixlEngine, name: str, staging: Region, remote: Region) -> None:
        self._engine = engine
        self._name = name
        self._staging = staging
        self._remote = remote
        self._requests: dict[int, tuple[int, int]] = {}  # by offset: size, request

    def write(self, offset: int, size: int) -> NixlWrite:
        try:
            request = self._prepared(offset, size)
            self._engine.agent.postXferReq(request, "")
        except Exception as error:
            raise self._engine.failure(error) from error
        return NixlWrite(self, offset, request)

    def _prepared(self, offset: int, size: int) -> int:
        """Most chunks fill their slots, so the request of a slot is made once and posted again."""
        known = self._requests.get(offset)
        if known is not None and known[0] == size:
            return known[1]
        self.release(offset)
        engine = self._engine
        local, remote = (engine.descriptors(region, offset, size) for region in (self._staging, self._remote))
        request: int = engine.agent.createXferReq(
            engine.library.NIXL_WRITE, local, remote, self._name, "", [engine.backend]
        )
        self._requests[offset] = (size, request)
        return request

    def landed(self, offset: int, request: int) -> bool:
        """See `Write`."""
        library = self._engine.library
        try:
            state = self._engine.agent.getXferStatus(request)
        except Exception as error:
            self.release(offset)
            raise self._engine.failure(error) from error
        if state == library.NIXL_IN_PROG:
            return False
        if state != library.NIXL_SUCCESS:
            self.release(offset)
            raise WireError(f"NIXL: a write ended as {state}", phase="send")
        return True

    def release(self, offset: int) -> None:
        """Forget the request of that slot. It stops no bytes that are under way."""
        known = self._requests.pop(offset, None)
        if known is not None:
            with contextlib.suppress(Exception):
                self._engine.agent.releaseXferReq(known[1])

    def close(self) -> None:
        for offset in list(self._requests):
            self.release(offset)
        with contextlib.suppress(Exception):
            self._engine.forget(self._staging)
        self._engine.part(self._name)


class NixlWrite:
    def __init__(self, target: NixlTarget, offset: int, request: int) -> None:
        self._target = target
        self._offset = offset
        self._request = request

    def landed(self) -> bool:
        return self._target.landed(self._offset, self._request)
