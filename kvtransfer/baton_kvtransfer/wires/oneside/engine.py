"""What a library of one-sided writes must do. Every call is made by one thread, the pump, and must not block for long.

Releasing a write does not stop it and deregistering memory is no fence (both measured, on NIXL over tcp and cma): a
write is over when `landed` says so, and memory that was once announced may be written for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

HOST = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Contiguous memory of this process. `device`: a GPU's index, or HOST."""

    address: int
    bytes: int
    device: int = HOST


class Write(Protocol):
    def landed(self) -> bool:
        """True: visible at the peer; call no more. Raises PeerGone, WireError when it failed."""


class Target(Protocol):
    """Landing memory of one peer, paired with staging memory of ours of the same size."""

    def write(self, offset: int, size: int) -> Write:
        """Start to copy staging[offset : offset + size] to the same place there. Raises PeerGone, WireError."""

    def close(self) -> None:
        """No write is under way any more: let go of the peer and of the staging memory."""


class Engine(Protocol):
    """Made by the pump's thread when the first link needs it."""

    @property
    def most_writes(self) -> int:
        """To one target at once; more wait."""

    def land(self, region: Region) -> bytes:
        """Let peers write it; returns what one needs to do so. Raises WireError."""

    def forget(self, region: Region) -> None:
        """Stop what can be stopped of it. Late writes may still arrive."""

    def reach(self, announced: bytes, staging: Region) -> Target:
        """`announced` came from a stranger. Raises WireError, PeerGone."""

    def close(self) -> None: ...
