"""How one page lies outside the pool: a header that says what it must be, then its bytes.

The key of a page binds its hash to everything that its bytes depend on besides the tokens: shape, dtype, model, and
which heads a rank holds. So a page of another model, format or rank cannot be found. The header binds the digest to the
key: bytes that were damaged, cut or filed under another key do not pass `intact`. The order of axes in the pool is not
part of it: payloads are always [layer, kv, head, token, dim].
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NewType

import xxhash

from baton_common.ids import PageHash
from baton_kvtransfer.blocks import XXH3, Seal
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.plan import Block

TierKey = NewType("TierKey", bytes)
"""16 bytes; names a page in every tier, also in one that other models and ranks share."""

HEADER_BYTES = 64
"""Keeps the payload aligned for any dtype and for whole cache lines."""

_HEADER = struct.Struct("<8s16sQQ24x")  # magic, key, payload bytes, digest
_MAGIC = b"batonkv1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """What bytes of a page depend on, besides the tokens that its hash names."""

    model_digest: str
    layout: PageLayout
    rank: int = 0  # of tensor parallelism: which heads
    ranks: int = 1

    def digest(self) -> bytes:
        layout = self.layout
        shape = (*layout.page_shape, layout.dtype, self.rank, self.ranks)
        text = "\x00".join(("baton-tier-1", self.model_digest, *map(str, shape)))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


def whole_page(layout: PageLayout) -> Block:
    return Block(
        layer_begin=0,
        layer_end=layout.layers,
        head_begin=0,
        head_end=layout.heads,
        token_begin=0,
        token_end=layout.page_tokens,
    )


class FrameFormat:
    """Of all pages of one namespace. A frame is HEADER_BYTES, then the payload."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace.digest()
        self.page = whole_page(namespace.layout)
        self.payload_bytes = self.page.bytes(namespace.layout)
        self.frame_bytes = HEADER_BYTES + self.payload_bytes

    def key(self, page: PageHash) -> TierKey:
        return TierKey(hashlib.blake2b(page, digest_size=16, key=self._namespace).digest())

    def seal(self, key: TierKey) -> Seal:
        """For the digest of the payload: the same bytes under another key have another one."""
        return Seal(XXH3, xxhash.xxh3_64_intdigest(_HEADER.pack(_MAGIC, key, self.payload_bytes, 0)))

    def payload(self, frame: memoryview) -> memoryview:
        return frame[HEADER_BYTES:]

    def label(self, frame: memoryview, key: TierKey, digest: int) -> None:
        """Write the header over a payload that `seal(key)` digested."""
        _HEADER.pack_into(frame, 0, _MAGIC, key, self.payload_bytes, digest)

    def digest(self, frame: memoryview) -> int:
        """What the header says; meaningful in a frame that is intact."""
        digest: int = _HEADER.unpack_from(frame)[3]
        return digest

    def intact(self, frame: memoryview, key: TierKey) -> bool:
        """Every bit is as it was when the page was labelled with this key."""
        digest = self.digest(frame)
        expected = _HEADER.pack(_MAGIC, key, self.payload_bytes, digest)
        return frame[:HEADER_BYTES] == expected and self.seal(key).over(self.payload(frame)) == digest
