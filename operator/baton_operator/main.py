"""`baton-operator`: settings, credentials, one process. Exit codes: 0 stopped, 1 broke down, 2 refused to start.

Owner of every task: leader election, workers, resync, health server, and kopf's watching, whose end (a
signal) ends all others. The Lease is given up last, after the last write.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.errors import ConfigError
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials, find_credentials
from baton_common.kube.errors import KubeError
from baton_common.logs import set_up
from baton_common.settings import from_command_line
from baton_operator.admission import Admission
from baton_operator.certificates import Lifetimes
from baton_operator.config import OperatorConfig
from baton_operator.controller import Controller
from baton_operator.facts import look_up
from baton_operator.health import serving
from baton_operator.kinds import INFERENCE_SERVICE
from baton_operator.leader import LeaderElection, LeaseTimes
from baton_operator.metrics import OperatorMetrics
from baton_operator.plan.intake import Platform
from baton_operator.plan.labels import MANAGER
from baton_operator.prerequisites import ClusterFacts
from baton_operator.reconcile import Reconciler
from baton_operator.recorder import EventRecorder
from baton_operator.rotation import Rotation
from baton_operator.watching import watch
from baton_operator.webhook import Webhook

log = logging.getLogger("baton.operator")

_FACTS_RETRY_S = 2.0


def main(argv: Sequence[str] | None = None, *, lifetimes: Lifetimes = Lifetimes()) -> int:
    """Entry point. Blocks until SIGINT or SIGTERM. `lifetimes` of the webhook's certificates are no setting."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        resolved, explain = from_command_line(
            OperatorConfig, section="operator", program="baton-operator", argv=arguments, environment=os.environ
        )
        if explain:
            for name, value, source, text in resolved.explain():
                sys.stdout.write(f"{name:20} {value:40} {source:30} {text}\n")
            return 0
        config = resolved.value
        set_up(level=config.log_level, style=config.log_style)
        credentials = find_credentials(config.kubeconfig, os.environ)
        return asyncio.run(_Operator(config, credentials, lifetimes).run())
    except ConfigError as error:
        sys.stderr.write(f"baton-operator: {error}\n")
        return 2


class _Operator:
    """One life."""

    def __init__(self, config: OperatorConfig, credentials: Credentials, lifetimes: Lifetimes) -> None:
        self._config = config
        self._credentials = credentials
        self._clock = SystemClock()
        # unique per start: a restarted pod must not take its predecessor's lead for its own
        self._identity = f"{platform.node()}_{uuid.uuid4().hex[:8]}"
        self._registry = CollectorRegistry()
        self._metrics = OperatorMetrics(self._registry)
        self._facts = ClusterFacts(
            platform=Platform(router_image=config.router_image, worker_image=config.worker_image), served=frozenset()
        )
        self._lease_times = LeaseTimes(
            lease_s=config.lease_s, renew_s=config.lease_renew_s, retry_s=config.lease_retry_s
        )
        self._lifetimes = lifetimes

    async def run(self) -> int:
        """Returns the exit status."""
        config, watching = self._config, asyncio.Event()
        async with self._client(lambda: True) as lease_client:
            election = self._election(lease_client)
            async with self._client(lambda: election.leads) as client:
                recorder = EventRecorder(client, identity=self._identity, clock=self._clock, wall=_utc)
                controller = Controller(
                    Reconciler(client, recorder, facts=lambda: self._facts, wall=_utc),
                    config=config, clock=self._clock, leads=lambda: election.leads, metrics=self._metrics,
                )  # fmt: skip
                election.on_change = controller.lead_changed
                async with serving(
                    health_port=config.health_port, metrics_port=config.metrics_port, registry=self._registry,
                    stalled_s=controller.stalled_s, watching=watching,
                ):  # fmt: skip
                    await self._first_facts(client)
                    webhook = self._webhook(client, election) if config.webhook_port else None
                    tasks = [
                        asyncio.create_task(election.run(), name="leader election"),
                        asyncio.create_task(controller.run(), name="workers"),
                        asyncio.create_task(self._resync(client, controller), name="resync"),
                        asyncio.create_task(
                            watch(controller, self._credentials, config, ready=watching, webhook=webhook),
                            name="watching",
                        ),
                    ]
                    if webhook is not None:
                        tasks.append(asyncio.create_task(webhook.rotation.run(), name="certificates"))
                    log.info("started", extra={"identity": self._identity, "server": self._credentials.server})
                    status = await _until_first_ends(tasks)
            await election.release()
        log.info("stopped", extra={"status": status})
        return status

    def _client(self, may_write: Callable[[], bool]) -> KubeClient:
        return KubeClient(
            self._credentials,
            manager=MANAGER,
            clock=self._clock,
            timeout_s=self._config.request_timeout_s,
            may_write=may_write,
            count=self._metrics.counted,
        )

    def _election(self, client: KubeClient) -> LeaderElection:
        return LeaderElection(
            client,
            namespace=self._config.lease_namespace or self._credentials.namespace,
            name=self._config.lease_name,
            identity=self._identity,
            clock=self._clock,
            wall=_utc,
            times=self._lease_times,
        )

    def _webhook(self, client: KubeClient, election: LeaderElection) -> Webhook:
        return Webhook(
            port=self._config.webhook_port,
            admission=Admission(client, facts=lambda: self._facts, reviews=self._metrics.reviews),
            rotation=Rotation(
                client,
                namespace=self._config.lease_namespace or self._credentials.namespace,
                name=self._config.webhook_name,
                leads=lambda: election.leads,
                clock=self._clock,
                wall=_utc,
                expires_s=self._metrics.certificate_expires.set,
                times=self._lifetimes,
            ),
        )

    async def _first_facts(self, client: KubeClient) -> None:
        """Waits for the API server: without it there is nothing to do."""
        while True:
            try:
                self._facts = await look_up(client, self._config)
                return
            except KubeError as error:
                log.warning("waiting for the API server: %s", error)
                await asyncio.sleep(_FACTS_RETRY_S)

    async def _resync(self, client: KubeClient, controller: Controller) -> None:
        """Facts and the list of services anew: a watch that went deaf costs one resync, not everything after it."""
        while True:
            await asyncio.sleep(self._config.resync_s)
            try:
                self._facts = await look_up(client, self._config)
                for namespace in self._config.namespaces or ("",):
                    for service in await client.list(INFERENCE_SERVICE, namespace):
                        controller.service_listed(service)
            except KubeError as error:
                log.warning("resync: %s", error)


async def _until_first_ends(tasks: Sequence[asyncio.Task[None]]) -> int:
    """All end with the first. 0 when that was an orderly end of watching, which is how a signal shows."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    status = 0
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s broke down", task.get_name(), exc_info=error)
            status = 1
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
    return status


def _utc() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())
