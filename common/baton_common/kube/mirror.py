"""A copy of some objects of one kind, kept like the API server has them: list, then watch, for ever.

It survives everything: ends of watches, versions that are too old, an API server that is away or refuses (the copy
stays as it was, one log line per outage with the remedy). A watch that cannot be opened degrades to lists at the pace
of the back-off. Knows nothing of what the objects mean. Owner of its loop: `run`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.kube.client import Change, KubeClient
from baton_common.kube.errors import Gone, KubeError
from baton_common.kube.kinds import Kind
from baton_common.kube.objects import Object, text

log = logging.getLogger("baton.kube.mirror")

WATCH_S = 60
SILENCE_S = 15.0
"""Longer than a watch may last: then the server, or the way to it, is dead."""

BACKOFF_MIN_S = 0.25
BACKOFF_MAX_S = 15.0
STEADY_S = 5.0


class Mirror:
    """`changed` gets all objects after each change; `troubled` one line when the copy may be out of date, "" when not.

    Both are called on the event loop and must not block. `random` gives numbers in [0, 1) for the jitter.
    """

    def __init__(
        self,
        client: KubeClient,
        kind: Kind,
        namespace: str,
        *,
        selector: str,
        changed: Callable[[Collection[Object]], None],
        troubled: Callable[[str], None],
        clock: Clock,
        random: Callable[[], float],
        watch_s: int = WATCH_S,
    ) -> None:
        self._client = client
        self._kind = kind
        self._namespace = namespace
        self._selector = selector
        self._changed = changed
        self._troubled = troubled
        self._clock = clock
        self._random = random
        self._watch_s = watch_s
        self._objects: dict[str, Object] = {}
        self._version = ""  # "" = list first
        self._failures = 0
        self._trouble: int | None = None  # HTTP status of the outage that was told

    async def run(self) -> None:
        """Ends only by cancellation."""
        while True:
            began_s = self._clock.now()
            wait_s = 0.0
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                steady = self._clock.now() - began_s >= min(STEADY_S, self._watch_s / 2)
            except Gone:
                steady, self._version = False, ""
            except BatonError as error:
                steady, self._version = False, ""
                wait_s = error.retry_after_ms / 1000
                self._fail(error)
            except Exception:
                log.exception("watching %s failed unexpectedly", self._kind.resource)
                steady, self._version = False, ""
            if steady:
                self._failures = 0
                continue
            self._failures += 1
            await asyncio.sleep(max(wait_s, backoff_s(self._failures, self._random())))

    async def _list(self) -> None:
        listing = await self._client.listing(self._kind, self._namespace, selector=self._selector)
        self._objects = {_key(item): item for item in listing.items}
        self._version = listing.version
        self._changed(self._objects.values())

    async def _watch(self) -> None:
        async with self._client.watch(
            self._kind, self._namespace, version=self._version, selector=self._selector,
            limit_s=self._watch_s, silence_s=self._watch_s + SILENCE_S,
        ) as changes:  # fmt: skip
            self._recover()
            async for change in changes:
                self._failures = 0
                self._apply(change)

    def _apply(self, change: Change) -> None:
        self._version = text(change.item, "metadata", "resourceVersion")
        if change.type == "BOOKMARK":
            return
        if change.type == "DELETED":
            self._objects.pop(_key(change.item), None)
        else:
            self._objects[_key(change.item)] = change.item
        self._changed(self._objects.values())

    def _fail(self, error: BatonError) -> None:
        status = error.status if isinstance(error, KubeError) else 0
        told = f"{error}{_remedy(status, self._kind)}"
        self._troubled(told)
        if status != self._trouble:
            log.warning("%s; going on with what is known", told)
        self._trouble = status

    def _recover(self) -> None:
        if self._trouble is not None:
            log.info("watching %s again", self._kind.resource)
        self._trouble = None
        self._troubled("")


def backoff_s(failures: int, chance: float, *, least_s: float = BACKOFF_MIN_S, most_s: float = BACKOFF_MAX_S) -> float:
    """Doubling pause after so many failures in a row, spread by `chance` in [0, 1) over half to one and a half."""
    return min(least_s * 2.0 ** min(failures - 1, 20), most_s) * (0.5 + chance)


def _remedy(status: int, kind: Kind) -> str:
    if status == 401:
        return "; the token of this ServiceAccount is not accepted: see that the account exists and is mounted"
    if status == 403:
        return f"; give the Role of this ServiceAccount get, list and watch on {kind.resource}"
    return ""


def _key(item: Object) -> str:
    return f"{text(item, 'metadata', 'namespace')}/{text(item, 'metadata', 'name')}"
