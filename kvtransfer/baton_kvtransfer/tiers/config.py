"""Settings of the storage tiers of one worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Default: no tiers. The host pool is what all others land in, so they need it."""

    host_bytes: int = 0  # host memory for KV pages; 0 = no tiers at all
    after_uses: int = 1  # a page is kept at its n-th use
    queue_pages: int = 256  # that may wait to be copied from or to the pool; more are left out
    pinned_fraction: float = 0.75  # of the host pool that sessions can keep from eviction
    session_bytes: int = 0  # of the host pool that the sessions of one owner can keep
    folder: str = ""  # for KV pages, of this worker alone; empty = none
    folder_bytes: int = 8 << 30  # most that the folder may take of its disk
    mooncake_master: str = ""  # host:port of a Mooncake store's master; empty = none
    mooncake_segment_bytes: int = 0  # host memory that this worker lends to the Mooncake store
    retry_s: float = 30.0  # how long a tier that failed is left alone
    slow_s: float = 2.0  # a tier whose call takes longer counts as failed
