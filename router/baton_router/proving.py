"""Which workers have proved that KV crosses to or from one of the other role; asks for probes until each has.

A decode worker that fits no prefill worker yet stays unproved, and so its pod not Ready: that is what keeps the last
pair of an old revision alive until the first pair of a new one works. One task per registered worker: fitting partners,
a few at a time, then a pause that doubles, cut short by a partner that was not tried yet. A proof holds for the life of
the worker's process. It knows neither pods nor the API: what is found is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton_common.kube.gates import TRANSPORT_GATE
from baton_common.kube.mirror import backoff_s
from baton_proto import worker_pb2 as wire
from baton_router.fleet import Fleet, difference
from baton_router.gates import ANYTHING, FALSE, TRUE, Condition
from baton_router.links import Link
from baton_router.metrics import RouterMetrics
from baton_router.probe import ProbeResult

AT_A_TIME = 3
Probe = Callable[[Link, Link], Awaitable[ProbeResult]]
"""(prefill, decode). Has a deadline of its own and raises nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofPace:
    """`nobody_grace_s`: workers come up in any order; so long nobody is told that there is no partner."""

    retry_min_s: float = 2.0
    retry_max_s: float = 10.0  # half as much again with jitter
    nobody_grace_s: float = 2.0


_PARTNERS = {wire.ROLE_PREFILL: wire.ROLE_DECODE, wire.ROLE_DECODE: wire.ROLE_PREFILL}
_NOBODY = {wire.ROLE_PREFILL: "NoPrefillWorker", wire.ROLE_DECODE: "NoDecodeWorker"}


class Tell(Protocol):
    """Say `condition` of `pod` as long as `worker` is what runs in it."""

    def __call__(self, pod: str, worker: str, condition: Condition) -> None: ...


class Prover:
    """Follows the fleet. `random` gives numbers in [0, 1)."""

    def __init__(
        self,
        fleet: Fleet,
        probe: Probe,
        tell: Tell,
        metrics: RouterMetrics,
        random: Callable[[], float],
        pace: ProofPace = ProofPace(),
    ) -> None:
        self._fleet = fleet
        self._probe = probe
        self._tell = tell
        self._metrics = metrics
        self._random = random
        self._pace = pace
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by key of the link
        self._proved: set[str] = set()  # keys of links
        self._pairs: dict[tuple[str, str], asyncio.Lock] = {}  # both partners may want the same probe
        self._turn = 0

    async def run(self) -> None:
        """Ends only by cancellation."""
        try:
            while True:
                self._follow()
                await self._change()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _follow(self) -> None:
        links = {link.key: link for role in _PARTNERS for link in self._registered(role) if link.pod}
        for key in self._tasks.keys() - links.keys():
            self._tasks.pop(key).cancel()
        for key in links.keys() - self._tasks.keys():
            self._tasks[key] = asyncio.create_task(self._prove(links[key], key), name=f"probe {key}")
        self._proved &= links.keys()
        self._pairs = {pair: lock for pair, lock in self._pairs.items() if set(pair) <= links.keys()}

    async def _prove(self, link: Link, key: str) -> None:
        """Returns with the proof."""
        tried: set[str] = set()
        failures, replaces = 0, ANYTHING
        while key not in self._proved:
            if fresh := self._fresh(link, tried):
                chosen = self._in_turn(fresh)
                tried.update(partner.key for partner in chosen)
                failed = await self._ask(link, chosen, replaces)
                self._say(link, key, failed)
                if failed is not None and failed.reason == "ProbeFailed":
                    replaces = ANYTHING - {TRUE}  # another router may have proved it: contradict once
            elif self._fresh(link, set()):
                failures += 1
                pause_s = backoff_s(
                    failures, self._random(), least_s=self._pace.retry_min_s, most_s=self._pace.retry_max_s
                )
                if not await self._fresh_within(pause_s, link, tried):
                    tried.clear()
            elif not await self._fresh_within(self._pace.nobody_grace_s, link, tried):
                if link.up:
                    self._say(link, key, self._nobody(link))
                await self._change()

    def _say(self, link: Link, key: str, condition: Condition | None) -> None:
        """What a task found is old when the partner's task has proved the pair meanwhile."""
        if condition is not None and key not in self._proved:
            self._tell(link.pod, key, condition)

    async def _ask(self, link: Link, partners: Sequence[Link], replaces: frozenset[str]) -> Condition | None:
        """One after the other, until one proves it: then both are told, and None comes back."""
        failed: list[str] = []
        busy: list[str] = []
        for partner in partners:
            prefill, decode = (link, partner) if _role(link) == wire.ROLE_PREFILL else (partner, link)
            pair = (prefill.key, decode.key)
            async with self._pairs.setdefault(pair, asyncio.Lock()):
                if link.key in self._proved:
                    return None
                result = await self._probe(prefill, decode)
            self._metrics.probed(result.verdict, result.seconds, result.bytes)
            if result.ok:
                self._crossed((prefill, decode), pair, result.message)
                return None
            (busy if result.verdict == "busy" else failed).append(result.message)
        if failed:
            return _condition(FALSE, "ProbeFailed", "; ".join(failed), replaces)
        return _condition(FALSE, "ProbeBusy", "; ".join(busy), ANYTHING - {TRUE})

    def _crossed(self, links: tuple[Link, Link], keys: tuple[str, str], message: str) -> None:
        proof = _condition(TRUE, "Probed", message, ANYTHING - {TRUE})
        for link, key in zip(links, keys, strict=True):
            if key == link.key and key not in self._proved:  # still the same process
                self._proved.add(key)
                self._tell(link.pod, key, proof)

    def _registered(self, role: wire.Role) -> list[Link]:
        return [link for link in self._fleet.registered() if _role(link) == role and not link.retired]

    def _fresh(self, link: Link, tried: set[str]) -> list[Link]:
        """Partners that fit and were not tried."""
        partners = self._registered(_PARTNERS[_role(link)]) if link.up else []
        return [
            partner
            for partner in partners
            if partner.up
            and not partner.load.draining
            and partner.compat == link.compat
            and partner.key not in tried
        ]

    def _in_turn(self, partners: Sequence[Link]) -> Sequence[Link]:
        """Several workers of a role do not all begin with the same partner."""
        self._turn += 1
        at = self._turn % len(partners)
        return [*partners[at:], *partners[:at]][:AT_A_TIME]

    def _nobody(self, link: Link) -> Condition:
        role = _PARTNERS[_role(link)]
        others = [partner for partner in self._registered(role) if partner.compat != link.compat]
        if others:
            pair = (link, others[0]) if role == wire.ROLE_DECODE else (others[0], link)
            message = difference(*pair)
        elif role == wire.ROLE_PREFILL and all(other.hello is not None for other in self._fleet.links):
            # the prefill pool is scaled to nothing: decode does all the work, and may
            return _condition(TRUE, "NotUsed", "there is no prefill worker, so no KV travels", ANYTHING - {TRUE})
        else:
            message = f"no {'decode' if role == wire.ROLE_DECODE else 'prefill'} worker is registered with the router"
        return _condition(FALSE, _NOBODY[role], message, ANYTHING - {TRUE})

    async def _fresh_within(self, seconds: float, link: Link, tried: set[str]) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not self._fresh(link, tried):
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def _change(self) -> None:
        """Until a worker comes, goes, or changes its mind."""
        changed = asyncio.Event()
        self._fleet.on_next_change(changed.set)
        try:
            await changed.wait()
        finally:
            self._fleet.forget(changed.set)


def _role(link: Link) -> wire.Role:
    return link.hello.role if link.hello is not None else wire.ROLE_UNSPECIFIED


def _condition(status: str, reason: str, message: str, replaces: frozenset[str]) -> Condition:
    return Condition(type=TRANSPORT_GATE, status=status, reason=reason, message=message, replaces=replaces)
