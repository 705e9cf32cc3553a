"""Checksums that places publish: whole-file ones, git's, and S3's over the checksums of the parts of an upload.

CRCs come from awscrt, which computes them in hardware. Knows no files and no network.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from awscrt import checksums

SIZE_ONLY = "size"
GIT = "git-sha1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """`value` in hex. `piece_bytes` > 0: of an upload in pieces of that size, over the digests of the pieces.

    Algorithm `size`: the place publishes nothing usable, and only the size can be compared.
    """

    algorithm: str
    value: str = ""
    piece_bytes: int = 0


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc:
    """A running CRC with the interface of hashlib."""

    def __init__(self, step: Callable[[bytes, int], int], width_bytes: int) -> None:
        self._step, self._width_bytes, self._value = step, width_bytes, 0

    def update(self, data: bytes, /) -> None:
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width_bytes, "big")


class _Pieces:
    """Hash over the hashes of pieces of equal size; the last one may be shorter."""

    def __init__(self, make: Callable[[], Hasher], piece_bytes: int) -> None:
        self._make, self._piece_bytes = make, piece_bytes
        self._outer, self._inner, self._room_bytes = make(), make(), piece_bytes

    def update(self, data: bytes, /) -> None:
        while data:
            head, data = data[: self._room_bytes], data[self._room_bytes :]
            self._inner.update(head)
            self._room_bytes -= len(head)
            if self._room_bytes == 0:
                self._close()

    def digest(self) -> bytes:
        if self._room_bytes < self._piece_bytes:
            self._close()
        return self._outer.digest()

    def _close(self) -> None:
        self._outer.update(self._inner.digest())
        self._inner, self._room_bytes = self._make(), self._piece_bytes


_MAKERS: dict[str, Callable[[], Hasher]] = {
    "sha256": hashlib.sha256,
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "crc32": lambda: _Crc(zlib.crc32, 4),
    "crc32c": lambda: _Crc(checksums.crc32c, 4),
    "crc64nvme": lambda: _Crc(checksums.crc64nvme, 8),
}


def hasher(digest: Digest, size_bytes: int) -> Hasher:
    """For a file of that size. Where only the size is known it is SHA-256, for the record."""
    if digest.algorithm == GIT:
        return hashlib.sha1(f"blob {size_bytes}\0".encode(), usedforsecurity=False)
    make = _MAKERS["sha256" if digest.algorithm == SIZE_ONLY else digest.algorithm]
    return _Pieces(make, digest.piece_bytes) if digest.piece_bytes else make()
