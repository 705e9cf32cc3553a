"""Mooncake's transfer engine without us: its tcp protocol, a request per page, in batches that its queue takes.

Its default queue refuses more than two thousand pages at once and then refuses that peer for ever, so it is raised.
"""

from __future__ import annotations

import time
from typing import Any

from baton_kvtransfer.wires.oneside import mooncake
from bench.kvtransfer.peers.host import Pair
from bench.kvtransfer.peers.memory import Addresses, Pool
from bench.kvtransfer.remote import Remote
from bench.kvtransfer.shapes import Shape

_ENVIRONMENT = {
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_LOG_LEVEL": "ERROR",
}


class Engine:
    def __init__(self, shape: Shape, seed: int, where: tuple[str, Addresses] | None = None) -> None:
        """`where`: of the target, for a source."""
        self._pool = Pool(shape, seed)
        self._engine: Any = mooncake.load()()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("Mooncake does not start")
        if self._engine.register_memory(self._pool.address, self._pool.bytes) != 0:
            raise RuntimeError("Mooncake does not register the pool")
        if where is not None:
            self._segment, self._local = where[0], self._pool.addresses.tolist()
            self._remote, self._sizes = where[1].tolist(), [self._pool.unit_bytes] * len(self._local)

    def where(self) -> tuple[str, Addresses]:
        return f"127.0.0.1:{self._engine.get_rpc_port()}", self._pool.addresses

    def move(self) -> float:
        begin_s = time.perf_counter()
        code = self._engine.batch_transfer_sync_write(self._segment, self._local, self._remote, self._sizes)
        if code != 0:
            raise RuntimeError(f"Mooncake ended with {code}")
        return time.perf_counter() - begin_s

    def content(self) -> int:
        return self._pool.content()

    def close(self) -> None:
        """Its destructor takes a second and does nothing that the end of the process does not."""


def direct(shape: Shape) -> Pair:
    def source(where: tuple[str, Addresses]) -> Remote:
        return Remote(Engine, shape, 3, where, environment=_ENVIRONMENT)

    return Pair("Mooncake tcp", shape, Remote(Engine, shape, 0, environment=_ENVIRONMENT), source)
