"""Memory of the peers' pools: of the same kind as ours, touched, in units of one page size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from baton_common.memory import large_pages
from bench.kvtransfer.shapes import Shape

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]


class Pool:
    """`seed` of bytes and of the order in which the units are visited; 0 = zeros."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.bytes = shape.bytes
        self.unit_bytes = shape.unit_bytes
        self.memory: Bytes = np.frombuffer(large_pages(shape.bytes), np.uint8)
        generator = np.random.default_rng(seed)
        self.memory[:] = generator.integers(0, 256, shape.bytes, dtype=np.uint8) if seed else 0
        self.order = generator.permutation(shape.units)

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def addresses(self) -> Addresses:
        """Of the units, in their order."""
        return (self.address + self.order * self.unit_bytes).astype(np.uint64)

    def vectors(self) -> Addresses:
        """struct iovec[units]"""
        addresses = self.addresses
        return np.stack([addresses, np.full_like(addresses, self.unit_bytes)], axis=1)

    def whole(self) -> int:
        """A digest of all bytes as they lie."""
        return xxhash.xxh3_64_intdigest(self.memory.data)

    def content(self) -> int:
        """A digest of all units in their order."""
        units = self.memory.reshape(-1, self.unit_bytes)
        return xxhash.xxh3_64_intdigest(np.ascontiguousarray(units[self.order]).data)
