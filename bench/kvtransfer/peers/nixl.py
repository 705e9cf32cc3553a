"""NIXL without us: one WRITE of all pages, a descriptor each, over UCX.

"As shipped" is what its Python class sets: progress threads on both sides that never pause. "Best" is what we found:
one on the target only, with pauses. `Slots` is our own use of it: whole slots, a write each.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import numpy as np

from baton_kvtransfer.wires.oneside import nixl
from baton_kvtransfer.wires.oneside.engine import Region
from bench.kvtransfer.peers.host import Pair
from bench.kvtransfer.peers.memory import Addresses, Pool
from bench.kvtransfer.remote import Remote
from bench.kvtransfer.shapes import Shape

_PAUSE_US = 1000
_CAP_S = 30.0


class Agent:
    """A pool registered with an agent of its own."""

    def __init__(
        self, shape: Shape, seed: int, progress: bool, pause_us: int, where: tuple[bytes, Addresses] | None = None
    ) -> None:
        """`where`: of the target, for a source."""
        self.library: Any = nixl.load()
        self.pool = Pool(shape, seed)
        config = self.library.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = progress, pause_us
        config.syncMode = self.library.NIXL_THREAD_SYNC_NONE
        self.agent: Any = self.library.nixlAgent(f"bench-{secrets.token_hex(4)}", config)
        self.backend = self.agent.createBackend("UCX", self.agent.getPluginParams("UCX")[0])
        entry = (self.pool.address, self.pool.bytes, 0, "")
        self.agent.registerMem(self.library.nixlRegDList(self.library.DRAM_SEG, [entry]), [self.backend])
        if where is not None:
            self._connect(where)

    def where(self) -> tuple[bytes, Addresses]:
        return self.agent.getLocalMD(), self.pool.addresses

    def _connect(self, where: tuple[bytes, Addresses]) -> None:
        name = self.agent.loadRemoteMD(where[0]).decode()
        local, remote = self._descriptors(self.pool.addresses), self._descriptors(where[1])
        self._request = self.agent.createXferReq(self.library.NIXL_WRITE, local, remote, name, "", [self.backend])

    def _descriptors(self, addresses: Addresses) -> Any:
        rows = np.stack([addresses, np.full_like(addresses, self.pool.unit_bytes), np.zeros_like(addresses)], axis=1)
        return self.library.nixlXferDList(self.library.DRAM_SEG, rows)

    def move(self) -> float:
        begin_s = time.perf_counter()
        state = self.agent.postXferReq(self._request, "")
        while state == self.library.NIXL_IN_PROG:
            state = self.agent.getXferStatus(self._request)
            if time.perf_counter() - begin_s > _CAP_S:
                raise RuntimeError("NIXL makes no progress")
        if state != self.library.NIXL_SUCCESS:
            raise RuntimeError(f"NIXL ended as {state}")
        return time.perf_counter() - begin_s

    def content(self) -> int:
        return self.pool.content()

    def close(self) -> None:
        self.agent = None


class Direct(Pair):
    def __init__(self, shape: Shape, *, tls: str, shipped: bool) -> None:
        environment = {"UCX_TLS": tls} if tls else {}
        pause_us = 0 if shipped else _PAUSE_US

        def source(where: tuple[bytes, Addresses]) -> Remote:
            return Remote(Agent, shape, 3, shipped, pause_us, where, environment=environment)

        target = Remote(Agent, shape, 0, True, pause_us, environment=environment)
        super().__init__(f"NIXL {tls or 'cma'}, {'as shipped' if shipped else 'best'}", shape, target, source)
        self.spins = shipped


class SlotTarget:
    """The engine of our own wire, and slots that it announces."""

    def __init__(self, shape: Shape) -> None:
        self._pool = Pool(shape, 0)
        self._engine = nixl.NixlEngine()

    def where(self) -> bytes:
        return self._engine.land(Region(address=self._pool.address, bytes=self._pool.bytes))

    def content(self) -> int:
        return self._pool.whole()

    def close(self) -> None:
        self._engine.close()


class SlotSource:
    def __init__(self, shape: Shape, announced: bytes) -> None:
        self._pool = Pool(shape, 3)
        self._engine = nixl.NixlEngine()
        self._target = self._engine.reach(announced, Region(address=self._pool.address, bytes=self._pool.bytes))

    def move(self) -> float:
        size = self._pool.unit_bytes
        begin_s = time.perf_counter()
        writes = [self._target.write(offset, size) for offset in range(0, self._pool.bytes, size)]
        for write in writes:
            while not write.landed():
                pass
        return time.perf_counter() - begin_s

    def content(self) -> int:
        return self._pool.whole()

    def close(self) -> None:
        self._engine.close()


class Slots(Pair):
    """Every slot once, as our wire pushes them, without gather, digest and protocol."""

    def __init__(self, shape: Shape) -> None:
        target = Remote(SlotTarget, shape)
        super().__init__("our NIXL engine", shape, target, lambda where: Remote(SlotSource, shape, where))
