"""What a storage tier must do: one of the extension protocols.

A tier keeps frames by key; it knows neither tokens nor models nor pools. It may lose, damage or refuse any of them at
any time: who asks it verifies. All calls come from one thread of the tier's own and may block; a call that raises is a
failure of the tier, which is then left alone for a while (see `Guard`). The host pool is none: all tiers land in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from baton_kvtransfer.tiers.frames import TierKey


class TierFault(Exception):
    """The tier does not work now; the text says why. Any other exception counts as one, too."""


class Tier(Protocol):
    @property
    def name(self) -> str:
        """In metrics and logs: "file", "mooncake"."""

    @property
    def bytes(self) -> int:
        """That it takes of this machine's disk or memory."""

    def open(self) -> None:
        """Before every other call; again after it raised."""

    def has(self, keys: Sequence[TierKey]) -> int:
        """How many of the leading keys it seems to have."""

    def put(self, key: TierKey, frame: memoryview) -> bool:
        """False: no room. A key that it has keeps its frame."""

    def get(self, key: TierKey, out: memoryview) -> int:
        """Fill `out` with as much of the frame as fits. Returns how many bytes the tier has for the key, 0 = none."""

    def delete(self, key: TierKey) -> None:
        """Forget it, if it is there."""

    def close(self) -> None:
        """After every other call, also when `open` never worked."""
