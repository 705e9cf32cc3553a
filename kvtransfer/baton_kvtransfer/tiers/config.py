"""Settings of the storage tiers of one worker; resolved at the edge of the process, section `tiers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Default: no tiers. The host pool is what all others land in, so they need it."""

    host_bytes: Annotated[int, Field(ge=0, description="host memory for KV pages, bytes; 0 = no tiers at all")] = 0
    after_uses: Annotated[int, Field(ge=1, description="a page is kept at its n-th use")] = 1
    queue_pages: Annotated[
        int, Field(ge=1, description="pages that may wait to be copied from or to the pool; more are left out")
    ] = 256
    pinned_fraction: Annotated[
        float, Field(ge=0, le=1, description="part of the host pool that sessions can keep from eviction")
    ] = 0.75
    folder: Annotated[str, Field(description="folder for KV pages, of this worker alone; empty = none")] = ""
    folder_bytes: Annotated[int, Field(ge=0, description="most that the folder may take of its disk, bytes")] = 8 << 30
    mooncake_master: Annotated[str, Field(description="host:port of a Mooncake store's master; empty = none")] = ""
    mooncake_segment_bytes: Annotated[
        int, Field(ge=0, description="host memory that this worker lends to the Mooncake store, bytes")
    ] = 0
    retry_s: Annotated[float, Field(gt=0, description="how long a tier that failed is left alone, seconds")] = 30.0
    slow_s: Annotated[float, Field(gt=0, description="a tier whose call takes longer counts as failed, seconds")] = 2.0
