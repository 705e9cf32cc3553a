"""Readiness gates: conditions on the workers' pods that say what this router knows of them.

What holds (registered, transport proved) is asserted as long as it holds, again every `resync_s`; what does not hold
any more is said once. So two routers that see different things never write in turn, and a pod that already says the
right thing is only read: no writes in steady state, none after a restart of the router. Failures are logged and
repeated and disturb nothing. Does not know how a transport is proved (`proving.py` does) nor where pods are found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.kube.client import KubeClient
from baton_common.kube.errors import Conflict, KubeError, NotFound
from baton_common.kube.gates import REGISTERED_GATE
from baton_common.kube.kinds import POD
from baton_common.kube.mirror import backoff_s
from baton_common.kube.objects import Object, objects, text
from baton_router.fleet import Fleet

log = logging.getLogger("baton.router.gates")

AT_ONCE = 8
"""Pods that are asked and told at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePace:
    """`unmet_grace_s`: so long a pod that this router never met, and that may carry a True of before, has to answer."""

    lost_grace_s: float = 2.0
    unmet_grace_s: float = 15.0
    resync_s: float = 20.0
    retry_min_s: float = 1.0


TRUE, FALSE, UNKNOWN, ABSENT = "True", "False", "Unknown", ""
ANYTHING = frozenset({TRUE, FALSE, UNKNOWN, ABSENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a pod shall say. It is written only over the statuses in `replaces`."""

    type: str
    status: str
    reason: str
    message: str
    replaces: frozenset[str] = field(compare=False)


REGISTERED = Condition(
    type=REGISTERED_GATE, status=TRUE, reason="Registered", message="a router holds the stream of this worker",
    replaces=ANYTHING - {TRUE},
)  # fmt: skip
LOST = Condition(
    type=REGISTERED_GATE, status=FALSE, reason="Lost", message="the router lost the stream of this worker",
    replaces=frozenset({TRUE}),
)  # fmt: skip


class PodWriter:
    """Conditions onto pods. `wall` gives the time for lastTransitionTime."""

    def __init__(self, client: KubeClient, namespace: str, wall: Callable[[], datetime]) -> None:
        self._client = client
        self._namespace = namespace
        self._wall = wall

    async def settle(self, pod: str, wanted: Sequence[Condition]) -> None:
        """Reads the pod and writes what it does not say yet, in one patch. Pods that go or are gone are left alone.

        Raises KubeError; Conflict when a namesake has taken the pod's place meanwhile.
        """
        found = await self._client.get(POD, self._namespace, pod)
        if found is None or text(found, "metadata", "deletionTimestamp"):
            return
        current = {text(item, "type"): item for item in objects(found, "status", "conditions")}
        news = [condition for condition in wanted if _is_news(condition, current.get(condition.type, {}))]
        if not news:
            return
        patch: Object = {
            "metadata": {"uid": text(found, "metadata", "uid")},
            "status": {"conditions": [self._written(item, current.get(item.type, {})) for item in news]},
        }
        with contextlib.suppress(NotFound):
            await self._client.strategic_merge(POD, self._namespace, pod, patch, subresource="status")
        for item in news:
            log.info("pod %s: %s is %s (%s)", pod, item.type, item.status, item.reason, extra={"why": item.message})

    def _written(self, condition: Condition, current: Object) -> Object:
        since = text(current, "lastTransitionTime") if text(current, "status") == condition.status else ""
        return {
            "type": condition.type,
            "status": condition.status,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": since or self._wall().strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def _is_news(condition: Condition, current: Object) -> bool:
    said = (text(current, "status"), text(current, "reason"), text(current, "message"))
    return said[0] in condition.replaces and said != (condition.status, condition.reason, condition.message)


@dataclass(slots=True)
class _Pod:
    """What is to be said about one pod, by type, and when next."""

    lost_s: float | None = None  # since when there is no stream; None while there is one
    grace_s: float = 0.0
    worker: str = ""  # key of the link that is registered
    holds: dict[str, Condition] = field(default_factory=dict)
    once: dict[str, Condition] = field(default_factory=dict)
    last: dict[str, Condition] = field(default_factory=dict)
    due_s: float = math.inf
    failures: int = 0
    lost_told: bool = False

    def tell(self, condition: Condition, now_s: float) -> None:
        if self.last.get(condition.type) == condition:
            return
        self.last[condition.type] = condition
        kept, dropped = (self.holds, self.once) if condition.status == TRUE else (self.once, self.holds)
        kept[condition.type] = condition
        dropped.pop(condition.type, None)
        self.due_s = now_s


class Gates:
    """Follows the fleet and keeps the pods told. `random` gives numbers in [0, 1)."""

    def __init__(
        self, fleet: Fleet, writer: PodWriter, clock: Clock, random: Callable[[], float], pace: GatePace = GatePace()
    ) -> None:
        self._fleet = fleet
        self._writer = writer
        self._clock = clock
        self._random = random
        self._pace = pace
        self._pods: dict[str, _Pod] = {}
        self._wake = asyncio.Event()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._trouble: int | None = None

    def tell(self, pod: str, worker: str, condition: Condition) -> None:
        """Say it of the pod, as long as `worker` (key of a link) is what runs in it."""
        self._observe(self._clock.now())
        entry = self._pods.get(pod)
        if entry is not None and entry.worker == worker:
            entry.tell(condition, self._clock.now())
            self._wake.set()

    async def run(self) -> None:
        """Ends only by cancellation."""
        while True:
            self._wake.clear()
            self._fleet.on_next_change(self._wake.set)
            now_s = self._clock.now()
            self._observe(now_s)
            due = [(pod, entry) for pod, entry in self._pods.items() if entry.due_s <= now_s]
            await asyncio.gather(*(self._settle(pod, entry) for pod, entry in due))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self._next_s() - self._clock.now(), 0.0)):
                    await self._wake.wait()

    def _next_s(self) -> float:
        """When something is due, be it the end of a grace."""
        entries = self._pods.values()
        graces = [entry.lost_s + entry.grace_s for entry in entries if entry.lost_s is not None and not entry.lost_told]
        return min([self._clock.now() + self._pace.resync_s, *graces, *(entry.due_s for entry in entries)])

    def _observe(self, now_s: float) -> None:
        """The ledger follows the fleet."""
        listed = {link.pod for link in self._fleet.links if link.pod}
        registered = {link.pod: link.key for link in self._fleet.registered() if link.pod}
        for pod in listed - self._pods.keys():
            self._pods[pod] = _Pod(lost_s=now_s, grace_s=self._pace.unmet_grace_s)
        for pod, entry in list(self._pods.items()):
            worker = registered.get(pod)
            if worker is not None and worker != entry.worker:
                entry = self._pods[pod] = _Pod(worker=worker)
                entry.tell(REGISTERED, now_s)
            elif worker is None and entry.lost_s is None:
                self._pods[pod] = _Pod(lost_s=now_s, grace_s=self._pace.lost_grace_s)
            elif worker is None and not entry.lost_told and now_s >= (entry.lost_s or 0.0) + entry.grace_s:
                entry.lost_told = True
                entry.tell(LOST, now_s)
            elif worker is None and entry.lost_told and not entry.once and pod not in listed:
                del self._pods[pod]

    async def _settle(self, pod: str, entry: _Pod) -> None:
        once = dict(entry.once)
        entry.due_s = math.inf  # whoever tells something meanwhile sets it again
        try:
            async with self._room:
                await self._writer.settle(pod, [*entry.holds.values(), *once.values()])
        except BatonError as error:
            entry.failures += 1
            pause_s = backoff_s(entry.failures, self._random(), least_s=self._pace.retry_min_s)
            self._failed(error)
        except Exception:
            log.exception("writing conditions of pod %s failed unexpectedly", pod)
            pause_s = self._pace.resync_s
        else:
            entry.failures = 0
            entry.once = {kind: said for kind, said in entry.once.items() if once.get(kind) is not said}
            pause_s = self._pace.resync_s * (0.9 + 0.2 * self._random()) if entry.holds else math.inf
            self._succeeded()
        entry.due_s = min(entry.due_s, self._clock.now() + pause_s)

    def _failed(self, error: BatonError) -> None:
        if isinstance(error, Conflict):
            return  # the next try sees the namesake
        status = error.status if isinstance(error, KubeError) else 0
        if status != self._trouble:
            remedy = "; give this ServiceAccount's Role get on pods and patch on pods/status" if status == 403 else ""
            log.warning("conditions of pods cannot be written, so none becomes Ready: %s%s", error, remedy)
        self._trouble = status

    def _succeeded(self) -> None:
        if self._trouble is not None:
            log.info("conditions of pods can be written again")
        self._trouble = None
