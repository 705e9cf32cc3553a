"""Where KV pages are kept that the KV pool has no room for: memory and disk of every worker, a Mooncake store.

Sizes are of each worker, on top of what the profile and `resources` give it. All tiers pass through the host memory.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from baton_operator.api.base import ObjectName, Quantity, Strict
from baton_operator.api.quantity import amount
from baton_operator.api.rules import rule

_ADDRESS = "^[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?:[0-9]{1,5}$"
_LEAST = "64Mi"


def _at_least(field: str) -> str:
    """CEL: an amount, where it is written, holds a few pages."""
    return f"!has(self.{field}) || quantity(string(self.{field})).compareTo(quantity('{_LEAST}')) >= 0"


def _holds_pages(size: int | str | None) -> bool:
    return size is None or amount(size) >= amount(_LEAST)


class Disk(Strict):
    """A folder of pages, each pod's own. It outlives a restart of the container and goes with the pod."""

    size: Annotated[Quantity, Field(description="of each worker; pages take nine tenths of it")]
    storage_class: Annotated[
        ObjectName | None, Field(description="of a volume that is made for each pod; default: the node's own disk")
    ] = None

    @rule(cel=_at_least("size"), field="size", message="that little holds no pages; raise disk.size to 64Mi or more")
    def disk_holds_pages(self) -> bool:
        return _holds_pages(self.size)


class Mooncake(Strict):
    """A Mooncake store that runs already: pages in the memory of many workers, found by all of them."""

    master: Annotated[
        str, Field(pattern=_ADDRESS, max_length=259, description="host:port of its master")
    ]
    memory: Annotated[
        Quantity | None, Field(description="that each worker lends to the store; absent = it only uses the others'")
    ] = None


class Sessions(Strict):
    """What clients may keep by `cache_control` for the next turn of a conversation."""

    quota: Annotated[
        Quantity, Field(description="of one tenant, in the host memory of each worker; without sessions: half of it")
    ]


class Cache(Strict):
    """Where every worker keeps KV pages that its KV pool has no room for."""

    host_memory: Annotated[
        Quantity | None, Field(description="of each worker, for pages; its memory request and limit grow by so much")
    ] = None
    disk: Disk | None = None
    mooncake: Mooncake | None = None
    sessions: Sessions | None = None

    @rule(
        cel="has(self.hostMemory)", field="hostMemory",
        message="pages reach every tier through host memory, and there is none; set cache.hostMemory, or remove cache",
    )  # fmt: skip
    def passes_through_memory(self) -> bool:
        return self.host_memory is not None

    @rule(
        cel=_at_least("hostMemory"), field="hostMemory",
        message="that little holds no pages; raise cache.hostMemory to 64Mi or more",
    )  # fmt: skip
    def holds_pages(self) -> bool:
        return _holds_pages(self.host_memory)

    @rule(
        cel="!has(self.sessions) || !has(self.hostMemory) || "
        "quantity(string(self.sessions.quota)).compareTo(quantity(string(self.hostMemory))) <= 0",
        field="sessions.quota",
        message="a tenant cannot keep more than there is; lower sessions.quota or raise cache.hostMemory",
    )
    def quota_within_memory(self) -> bool:
        if self.sessions is None or self.host_memory is None:
            return True
        return amount(self.sessions.quota) <= amount(self.host_memory)
