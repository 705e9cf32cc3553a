"""Identity of KV pages: a chain of 128-bit hashes over full pages of token ids.

hash(page i) covers the tokens of page i and, through its parent, everything before it; the chain starts at a root
seeded with what else the KV depends on (model digest, weights epoch, adapter, cache salt). Equal hash = equal KV.
The same value is the key in a worker's prefix tree, in KV events, in the router's index and in storage tiers.
blake2b: keyed attacks on shared caches need a collision-resistant function; 64-token pages make its cost invisible.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence

from baton_common.ids import PageHash

HASH_BYTES = 16


def chain_root(model_digest: str, weights_epoch: int = 0, adapter: str = "") -> PageHash:
    """Start of the chain for one model state. Workers send it to routers in their hello."""
    text = "\x00".join(("baton-page-chain-1", model_digest, str(weights_epoch), adapter))
    return PageHash(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest())


def salted_root(root: PageHash, cache_salt: str) -> PageHash:
    """Start of the chain for one cache salt; requests with different salts never share pages."""
    if not cache_salt:
        return root
    salted = hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES, key=root)
    return PageHash(salted.digest())


def page_hashes(root: PageHash, tokens: Sequence[int], page_tokens: int) -> list[PageHash]:
    """Hashes of all full pages of `tokens`; a partial last page has none."""
    return extend_chain(root, tokens[: len(tokens) // page_tokens * page_tokens], page_tokens)


def extend_chain(parent: PageHash, tokens: Sequence[int], page_tokens: int) -> list[PageHash]:
    """Hashes of the full pages in `tokens` that follow the page `parent`. len(tokens) must be whole pages."""
    if len(tokens) % page_tokens:
        raise ValueError(f"{len(tokens)} tokens are no whole pages of {page_tokens}")
    raw = token_bytes(tokens)
    step = 4 * page_tokens
    hashes: list[PageHash] = []
    for offset in range(0, len(raw), step):
        digest = hashlib.blake2b(raw[offset : offset + step], digest_size=HASH_BYTES, key=parent).digest()
        parent = PageHash(digest)
        hashes.append(parent)
    return hashes


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Little-endian int32, as token ids travel on the wire."""
    packed = array.array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def tokens_from_bytes(raw: bytes) -> list[int]:
    """Inverse of `token_bytes`. Raises ValueError when the length is no multiple of 4."""
    packed = array.array("i")
    packed.frombytes(raw)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
