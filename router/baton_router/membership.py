"""Life in a cluster: one API client, and what uses it: discovery of workers, readiness gates, proofs of the transport.

Owner of their tasks. None of it can disturb serving: whatever fails here is logged and begun again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

from baton_common.clock import Clock
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials
from baton_router.discovery import Discovery
from baton_router.fleet import Fleet
from baton_router.gates import Gates, PodWriter
from baton_router.metrics import RouterMetrics
from baton_router.probe import probe
from baton_router.proving import Prover

log = logging.getLogger("baton.router.membership")

RESTART_S = 5.0


class Membership:
    """Assigns the pods of `services` to `fleet`, and tells these pods what it knows of them."""

    def __init__(
        self,
        credentials: Credentials,
        services: Sequence[str],
        fleet: Fleet,
        metrics: RouterMetrics,
        *,
        vocab_size: int,
        clock: Clock,
    ) -> None:
        self._credentials = credentials
        self._services = services
        self._fleet = fleet
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._clock = clock

    async def run(self) -> None:
        """Ends only by cancellation."""
        while True:
            try:
                await self._run()
            except Exception:
                log.exception("discovery of workers failed unexpectedly")
                self._fleet.trouble = "internal error in the discovery of workers; the router's log has the details"
            await asyncio.sleep(RESTART_S)

    async def _run(self) -> None:
        fleet, metrics, namespace = self._fleet, self._metrics, self._credentials.namespace
        async with KubeClient(
            self._credentials, manager="baton-router", clock=self._clock, count=metrics.kube_called
        ) as client:
            discovery = Discovery(
                client, fleet, namespace=namespace, services=self._services, clock=self._clock, random=random.random
            )
            metrics.watch_endpoints(lambda: discovery.endpoints)
            writer = PodWriter(client, namespace, wall=partial(datetime.now, UTC))
            gates = Gates(fleet, writer, self._clock, random.random)
            prover = Prover(fleet, partial(probe, vocab_size=self._vocab_size), gates.tell, metrics, random.random)
            async with asyncio.TaskGroup() as tasks:
                for part in (discovery, gates, prover):
                    tasks.create_task(part.run())
