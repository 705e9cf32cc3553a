"""One replica leads: a coordination.k8s.io/Lease, held by renewing it.

Story. Every replica calls `step` again and again. The Lease names its holder; each renewal changes the Lease. A replica
that has seen it unchanged for `lease_s` on its *own* clock (clocks of machines are never compared) takes it over, with
the Lease's resourceVersion as the condition, so of two takers one gets a conflict. The holder renews every `retry_s`;
if it cannot for `renew_s`, it stops leading by itself, `lease_s - renew_s` before anyone else may start: `leads` is
asked before every write, so two replicas never write at one time. A holder that stops in order gives the Lease up.

From the death of a leader to the next: at most lease_s + retry_s * (1 + jitter) + one call; by default < 16 s.
Knows nothing of what the leader does.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from baton_common.clock import Clock
from baton_common.errors import ConfigError
from baton_common.kube.client import KubeClient
from baton_common.kube.errors import Conflict, KubeError
from baton_common.kube.objects import Object, canonical, integer, mapping, text
from baton_operator.kinds import LEASE

log = logging.getLogger("baton.operator.leader")

_DELETED = "deleted"  # no spec looks like this


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """Seconds. `renew_s` is the deadline after which a holder without success stops."""

    lease_s: float = 12.0
    renew_s: float = 8.0
    retry_s: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not self.retry_s * (1 + self.jitter) < self.renew_s < self.lease_s:
            raise ConfigError(
                f"lease times need retry < renew < lease, got {self.retry_s} < {self.renew_s} < {self.lease_s} seconds"
            )


class LeaderElection:
    """`step` looks at the Lease once; `run` does so for ever. Owner of the Lease named at construction."""

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        name: str,
        identity: str,
        clock: Clock,
        wall: Callable[[], datetime],
        times: LeaseTimes,
        dice: random.Random | None = None,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._clock = clock
        self._wall = wall
        self._times = times
        self._dice = dice or random.Random()
        self.on_change: Callable[[bool], None] = _nothing  # told of every change of `leads`
        self._seen = ""  # the Lease's spec when it last changed
        self._seen_s = 0.0
        self._renewed_s: float | None = None  # when our last successful write was *sent*
        self._told = False

    @property
    def leads(self) -> bool:
        """True only while nobody else may have taken over. Asked before every write."""
        return self._renewed_s is not None and self._clock.now() - self._renewed_s < self._times.renew_s

    async def run(self) -> None:
        """Until cancelled. Give the lead up afterwards with `release`."""
        while True:
            await self.step()
            await asyncio.sleep(self._times.retry_s * (1 + self._dice.uniform(0, self._times.jitter)))

    async def step(self) -> None:
        """Renew, take over, or wait. Never raises for the API's sake: what fails is tried again at the next step."""
        try:
            async with asyncio.timeout(self._times.renew_s - self._times.retry_s):
                await self._look()
        except (KubeError, TimeoutError) as error:
            log.warning("lease %s: %s", self._name, error or "the API server does not answer")
        self.report()

    def report(self) -> None:
        """Tell about a change of `leads`, once."""
        if self.leads != self._told:
            self._told = not self._told
            log.info("leading" if self._told else "not leading any more", extra={"identity": self._identity})
            self.on_change(self._told)

    async def release(self) -> None:
        """Let the next replica start at once. Best effort, within the call's own deadline."""
        if self._renewed_s is None:
            return
        self._renewed_s = None
        self.report()
        try:
            lease = await self._client.get(LEASE, self._namespace, self._name)
            if lease is not None and text(lease, "spec", "holderIdentity") == self._identity:
                await self._client.replace(LEASE, self._namespace, self._name, self._lease(lease, holder=""))
        except KubeError as error:
            log.warning("could not release the lease %s: %s", self._name, error)

    async def _look(self) -> None:
        lease = await self._client.get(LEASE, self._namespace, self._name)
        now_s = self._clock.now()
        if lease is None:
            await self._look_at_none(now_s)
            return
        spec = canonical(mapping(lease, "spec"))
        if spec != self._seen:
            self._seen, self._seen_s = spec, now_s
        holder = text(lease, "spec", "holderIdentity")
        # its own word counts: a holder may have been told longer times than we were
        lasts_s = max(self._times.lease_s, float(integer(lease, "spec", "leaseDurationSeconds")))
        if holder in ("", self._identity) or now_s - self._seen_s >= lasts_s:
            await self._write(lease)
        elif self._renewed_s is not None:
            log.warning("the lease %s is held by %s now", self._name, holder)
            self._renewed_s = None

    async def _look_at_none(self, now_s: float) -> None:
        """A first one is made at once. One that was deleted may still be led by, or go together with its release."""
        if self._seen and self._seen != _DELETED:
            self._seen, self._seen_s = _DELETED, now_s
        if not self._seen or now_s - self._seen_s >= self._times.lease_s:
            await self._write(None)

    async def _write(self, lease: Object | None) -> None:
        sent_s = self._clock.now()
        manifest = self._lease(lease, holder=self._identity)
        try:
            if lease is None:
                written = await self._client.create(LEASE, self._namespace, manifest)
            else:
                written = await self._client.replace(LEASE, self._namespace, self._name, manifest)
        except Conflict:
            return  # somebody was faster; the next step sees who
        self._seen, self._seen_s, self._renewed_s = canonical(mapping(written, "spec")), sent_s, sent_s

    def _lease(self, old: Object | None, *, holder: str) -> Object:
        now = self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        former = mapping(old, "spec")
        changes = integer(former, "leaseTransitions")
        keeps = text(former, "holderIdentity") == holder
        spec: Object = {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(self._times.lease_s)),
            "renewTime": now,
            "acquireTime": text(former, "acquireTime") if keeps and text(former, "acquireTime") else now,
            "leaseTransitions": changes if keeps or not holder else changes + (old is not None),
        }
        # as it was, labels and all: the Lease may be part of a release
        metadata = mapping(old, "metadata") or {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}


def _nothing(leads: bool) -> None:
    """Nobody wants to know."""
