"""Which prefill workers have proved that their KV reaches a decode worker; asks for probes until each has.

One task per registered prefill worker: fitting decode workers, a few at a time, then a pause that doubles, cut short
by a decode worker that was not tried yet. A proof holds for the life of the worker's process. It knows neither pods nor
the API: what is found is told.
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
    """`nobody_grace_s`: workers come up in any order; so long nobody is told that there is no decode worker."""

    retry_min_s: float = 2.0
    retry_max_s: float = 10.0  # half as much again with jitter
    nobody_grace_s: float = 2.0


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
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by key of the prefill link; one that is done is a proof
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
        prefills = {link.key: link for link in self._registered(wire.ROLE_PREFILL) if link.pod}
        for key in self._tasks.keys() - prefills.keys():
            self._tasks.pop(key).cancel()
        for key in prefills.keys() - self._tasks.keys():
            self._tasks[key] = asyncio.create_task(self._prove(prefills[key], key), name=f"probe {key}")

    async def _prove(self, prefill: Link, key: str) -> None:
        """Returns with the proof."""
        tried: set[str] = set()
        failures, replaces = 0, ANYTHING
        while True:
            if fresh := self._fresh(prefill, tried):
                chosen = self._in_turn(fresh)
                tried.update(decode.key for decode in chosen)
                found = await self._ask(prefill, chosen, replaces)
                self._tell(prefill.pod, key, found)
                if found.status == TRUE:
                    return
                if found.reason == "ProbeFailed":
                    replaces = ANYTHING - {TRUE}  # another router may have proved it: contradict once
            elif self._fresh(prefill, set()):
                failures += 1
                pause_s = backoff_s(
                    failures, self._random(), least_s=self._pace.retry_min_s, most_s=self._pace.retry_max_s
                )
                if not await self._fresh_within(pause_s, prefill, tried):
                    tried.clear()
            elif not await self._fresh_within(self._pace.nobody_grace_s, prefill, tried):
                if prefill.up:
                    self._tell(prefill.pod, key, self._nobody(prefill))
                await self._change()

    async def _ask(self, prefill: Link, decodes: Sequence[Link], replaces: frozenset[str]) -> Condition:
        """One after the other, until one proves it."""
        failed: list[str] = []
        busy: list[str] = []
        for decode in decodes:
            result = await self._probe(prefill, decode)
            self._metrics.probed(result.verdict, result.seconds, result.bytes)
            if result.ok:
                return _condition(TRUE, "Probed", result.message, ANYTHING - {TRUE})
            (busy if result.verdict == "busy" else failed).append(result.message)
        if failed:
            return _condition(FALSE, "ProbeFailed", "; ".join(failed), replaces)
        return _condition(FALSE, "ProbeBusy", "; ".join(busy), ANYTHING - {TRUE})

    def _registered(self, role: wire.Role) -> list[Link]:
        return [
            link
            for link in self._fleet.registered()
            if link.hello is not None and link.hello.role == role and not link.retired
        ]

    def _fresh(self, prefill: Link, tried: set[str]) -> list[Link]:
        """Decode workers that fit and were not tried."""
        decodes = self._registered(wire.ROLE_DECODE) if prefill.up else []
        return [
            link
            for link in decodes
            if link.up and not link.load.draining and link.compat == prefill.compat and link.key not in tried
        ]

    def _in_turn(self, decodes: Sequence[Link]) -> Sequence[Link]:
        """Several prefill workers do not all begin with the same one."""
        self._turn += 1
        at = self._turn % len(decodes)
        return [*decodes[at:], *decodes[:at]][:AT_A_TIME]

    def _nobody(self, prefill: Link) -> Condition:
        others = [link for link in self._registered(wire.ROLE_DECODE) if link.compat != prefill.compat]
        message = difference(prefill, others[0]) if others else "no decode worker is registered with the router"
        return _condition(FALSE, "NoDecodeWorker", message, ANYTHING - {TRUE})

    async def _fresh_within(self, seconds: float, prefill: Link, tried: set[str]) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not self._fresh(prefill, tried):
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


def _condition(status: str, reason: str, message: str, replaces: frozenset[str]) -> Condition:
    return Condition(type=TRANSPORT_GATE, status=status, reason=reason, message=message, replaces=replaces)
