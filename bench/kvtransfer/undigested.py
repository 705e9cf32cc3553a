"""A pool without digests, for benchmarks alone: what the digest costs is the difference to the real one.

Both ends must bring it; a worker never offers this kind, so that no link of the product can agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.ids import PageId
from baton_kvtransfer.blocks import HostBlocks, Seal
from baton_kvtransfer.plan import Block


class Nothing:
    def update(self, piece: memoryview, /) -> None:
        """Looks at no byte."""

    def intdigest(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Unsealed(Seal):
    def running(self) -> Nothing:
        return Nothing()

    def over(self, payload: memoryview) -> int:
        return 0

    def around(self, body: int) -> int:
        return 0


_UNSEALED = Unsealed("none", 0)


class UndigestedBlocks(HostBlocks):
    digests: Sequence[str] = ("none",)

    def for_payloads(self, dtype: str) -> UndigestedBlocks:
        """Both pools are alike."""
        return self

    def gather(self, block: Block, pages: Sequence[PageId], out: memoryview, seal: Seal) -> int:
        return super().gather(block, pages, out, _UNSEALED)

    def scatter(
        self, block: Block, pages: Sequence[PageId], payload: memoryview, seal: Seal, *, digest: int, shared: bool
    ) -> bool:
        return super().scatter(block, pages, payload, _UNSEALED, digest=0, shared=False)
