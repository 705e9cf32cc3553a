"""`python -m bench.gpu.handoff`: KV between two processes on one GPU.

Rows: writes of slots in GPU memory through NIXL (`cuda_ipc` where UCX can), against a copy within the device; a handoff
of device pools end to end; what it adds after the last layer. `--dry-run` does the same with host memory, briefly: the
figures mean nothing, the code ran. Gather+digest and scatter+verify are rows of `bench.gpu.kernels`, family pages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.wires.oneside import nixl
from baton_kvtransfer.wires.oneside.engine import HOST, Region
from baton_worker.blocks import blocks_for
from bench.ceilings import best_s
from bench.kvtransfer import exposed
from bench.kvtransfer.contenders import OurWire
from bench.kvtransfer.node import Node
from bench.kvtransfer.remote import Remote, RemoteFailed
from bench.kvtransfer.shapes import LLAMA, Shape
from bench.report import Report, Row

SLOT_BYTES, SLOTS = 4 << 20, 64
REPEATS = 20
GOAL = 0.70


class DeviceNode(Node):
    """Its pool is on the device. Bytes are the same on both sides from the start: what is measured is time."""

    def __init__(self, device: str, name: str, wire: str, shape: Shape, digest: bool, seed: int) -> None:
        self._device = open_device(device, threads=1)
        super().__init__(name, wire, shape, digest, seed)

    def _memory(self, shape: Shape, seed: int) -> tuple[torch.Tensor, Blocks | None]:
        pool = KvPool(shape.layout, shape.pages, self._device)
        return pool.tensor, blocks_for(self._device, pool)

    def close(self) -> None:
        super().close()
        self._device.close()


class Slots:
    """Registered memory of one process, on the device or the host."""

    def __init__(self, device: str, announced: bytes | None = None) -> None:
        self._memory = torch.zeros(SLOTS * SLOT_BYTES, dtype=torch.uint8, device=device)
        index = self._memory.device.index
        region = Region(
            address=self._memory.data_ptr(), bytes=SLOTS * SLOT_BYTES, device=HOST if index is None else index
        )
        self._engine = nixl.NixlEngine()
        self.announced = b""
        self._target: Any = None
        if announced is None:
            self.announced = self._engine.land(region)
        else:
            self._memory.fill_(7)
            self._target = self._engine.reach(announced, region)

    def where(self) -> bytes:
        return self.announced

    def move(self) -> float:
        begin_s = time.perf_counter()
        writes = [self._target.write(index * SLOT_BYTES, SLOT_BYTES) for index in range(SLOTS)]
        for write in writes:
            while not write.landed():
                pass
        return time.perf_counter() - begin_s

    def arrived(self) -> bool:
        return bool((self._memory == 7).all())

    def close(self) -> None:
        self._engine.close()


def copy_gbps(device: str, repeats: int) -> float:
    """Within the device; reads and writes are counted once, as in the rows."""
    source = torch.ones(SLOTS * SLOT_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()

    return len(source) / best_s(copy, repeats) / 1e9


def write_row(report: Report, device: str, repeats: int) -> None:
    ceiling = copy_gbps(device, repeats)
    target = Remote(Slots, device)
    try:
        source = Remote(Slots, device, target.call("where"))
        seconds = min(source.call("move") for _ in range(repeats))
        note = "" if target.call("arrived") else "wrong bytes arrived"
        source.close()
    finally:
        target.close()
    gbps = 0.0 if note else SLOTS * SLOT_BYTES / seconds / 1e9
    report.add(
        Row(name=f"NIXL writes of {SLOT_BYTES >> 20} MiB slots between two processes", value=gbps, unit="GB/s",
            ceiling=ceiling, ceiling_name="device copy", goal=GOAL, note=note)
    )  # fmt: skip


def handoff_rows(report: Report, device: str, repeats: int) -> None:
    pair = OurWire("shm", LLAMA, digest=True, node=partial(DeviceNode, device))
    try:
        pair.once()
        gbps = LLAMA.bytes / min(pair.once() for _ in range(repeats)) / 1e9
        report.add(Row(name="handoff of 64 MiB, shm", value=gbps, unit="GB/s"))
        exposed.add_row(report, pair, "exposed tail, shm, 8 MiB a layer")
    finally:
        pair.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.handoff", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="host memory in place of the GPU's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device, repeats = ("cpu", 2) if options.dry_run else ("cuda:0", REPEATS)
    report = Report(title="KV handoff on a GPU", settings={"device": device})
    try:
        write_row(report, device, repeats)
    except RemoteFailed as error:
        print(f"  NIXL is left out: {str(error).strip().splitlines()[-1]}")
    handoff_rows(report, device, repeats)
    report.show()
    if options.json:
        report.write(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
