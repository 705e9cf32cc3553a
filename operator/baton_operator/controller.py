"""Feeds services to the reconciler: hears of changes, keeps the line, runs a few workers while this replica leads.

Owner of the queue and of the worker tasks. Every replica hears everything, so a new leader knows all services at once;
it looks at each of them once when it begins to lead.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.kube.errors import Conflict, KubeError, NotLeader
from baton_common.kube.objects import Object, text
from baton_operator.config import OperatorConfig
from baton_operator.metrics import OperatorMetrics
from baton_operator.reconcile import Outcome
from baton_operator.workqueue import BackOff, WorkQueue

log = logging.getLogger("baton.operator.controller")

_GATHER_S = 0.2  # changes of children come in bursts; one pass for all of them
_LOOK_S = 1.0    # longest sleep of a worker


class ServiceKey(NamedTuple):
    namespace: str
    name: str


class Passes(Protocol):
    """One pass over one service (`reconcile.Reconciler`)."""

    async def reconcile(self, namespace: str, name: str) -> Outcome: ...


class Controller:
    """`service_changed`, `child_changed` and `profile_changed` may be called at any time on the event loop."""

    def __init__(
        self,
        passes: Passes,
        *,
        config: OperatorConfig,
        clock: Clock,
        leads: Callable[[], bool],
        metrics: OperatorMetrics,
        dice: random.Random | None = None,
    ) -> None:
        self._passes = passes
        self._config = config
        self._clock = clock
        self._leads = leads
        self._metrics = metrics
        self._dice = dice or random.Random()
        back_off = BackOff(first_s=config.back_off_first_s, cap_s=config.back_off_cap_s)
        self._queue: WorkQueue[ServiceKey] = WorkQueue(clock, back_off=back_off, dice=self._dice)
        self._known: dict[ServiceKey, str] = {}  # all services and their profiles
        self._gauged: set[ServiceKey] = set()  # services with a series in `metrics.ready`
        self._wake = asyncio.Event()
        self._worked_s = clock.now()
        metrics.watch_queue(lambda: self._queue.ready, lambda: self._queue.working)
        metrics.services.set_function(lambda: float(len(self._known)))

    def service_changed(self, namespace: str, name: str, profile: str) -> None:
        key = ServiceKey(namespace, name)
        self._known[key] = profile
        self._add(key, 0.0)

    def service_listed(self, service: Object) -> None:
        """As `service_changed`, for one that may have been overheard."""
        namespace, name = text(service, "metadata", "namespace"), text(service, "metadata", "name")
        self.service_changed(namespace, name, text(service, "spec", "profile"))

    def service_gone(self, namespace: str, name: str) -> None:
        key = ServiceKey(namespace, name)
        self._known.pop(key, None)
        self._add(key, 0.0)  # a pass that finds nothing forgets the rest

    def child_changed(self, namespace: str, service: str) -> None:
        key = ServiceKey(namespace, service)
        if key in self._known:
            self._add(key, _GATHER_S)

    def profile_changed(self, profile: str) -> None:
        for key, used in self._known.items():
            if used == profile:
                self._add(key, 0.0)

    def lead_changed(self, leads: bool) -> None:
        """A new leader looks at everything; what an old one had in line is no longer its business."""
        self._metrics.leader.set(leads)
        self._queue.clear()
        if leads:
            for key in self._known:
                self._add(key, 0.0)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.workers):
                group.create_task(self._work())

    def stalled_s(self) -> float:
        """How long the workers have not come round; for the liveness probe."""
        return self._clock.now() - self._worked_s

    def _add(self, key: ServiceKey, after_s: float) -> None:
        if self._leads():
            self._queue.add(key, after_s=after_s)
            self._wake.set()

    async def _work(self) -> None:
        while True:
            self._worked_s = self._clock.now()
            key = self._queue.pop() if self._leads() else None
            if key is None:
                await self._rest()
            else:
                await self._one(key)

    async def _rest(self) -> None:
        self._wake.clear()
        due_s = self._queue.next_due_s() if self._leads() else None
        try:
            async with asyncio.timeout(_LOOK_S if due_s is None else min(_LOOK_S, max(0.005, due_s))):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _one(self, key: ServiceKey) -> None:
        began_s, extra = self._clock.now(), {"namespace": key.namespace, "service": key.name}
        result = "error"
        try:
            outcome = await self._passes.reconcile(key.namespace, key.name)
            self._metrics.reconcile_seconds.observe(self._clock.now() - began_s)
            result = self._done(key, outcome)
        except NotLeader:
            result = "not_leader"
            self._queue.succeed(key)
        except Conflict as error:
            result = "conflict"  # somebody wrote between our look and our write; look again
            delay_s = self._queue.fail(key)
            log.debug("again in %.1f s: %s", delay_s, error, extra=extra)
        except (BatonError, TimeoutError) as error:
            asked_s = error.retry_after_s if isinstance(error, KubeError) else 0.0
            delay_s = self._queue.fail(key, least_s=asked_s)
            log.warning("again in %.1f s: %s", delay_s, error or "the pass took too long", extra=extra)
        except asyncio.CancelledError:
            result = "cancelled"
            self._queue.succeed(key)
            raise
        except Exception:
            delay_s = self._queue.fail(key)
            log.exception("defect in a pass; again in %.1f s", delay_s, extra=extra)
        finally:
            self._metrics.reconciles.labels(result).inc()

    def _done(self, key: ServiceKey, outcome: Outcome) -> str:
        if outcome.gone:
            self._queue.forget(key)
            if key in self._gauged:
                self._gauged.discard(key)
                self._metrics.ready.remove(*key)
            return "gone"
        self._gauged.add(key)
        self._metrics.ready.labels(*key).set(outcome.ready)
        again_s = self._config.resync_s if outcome.settled else self._config.unready_resync_s
        self._queue.succeed(key, again_s=again_s * self._dice.uniform(0.8, 1.0))
        return "ready" if outcome.ready else "not_ready"
