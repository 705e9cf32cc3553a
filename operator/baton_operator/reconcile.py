"""One pass over one service: look at everything, change what is not as planned, say how it stands.

Level-triggered: a pass knows nothing of what happened, only of what is. It may be started at any time, broken off at
any point and run twice; the next one finds the rest. In a settled cluster a pass only reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from baton_common.kube.client import KubeClient
from baton_common.kube.errors import KubeError, NameTaken
from baton_common.kube.objects import Object, canonical, integer, mapping, objects, text, texts
from baton_operator.api import ConditionType, ServiceStatus
from baton_operator.apply import Applier, Changes
from baton_operator.finding import Finding
from baton_operator.kinds import INFERENCE_SERVICE
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.children import Desired, desired, scale_steps
from baton_operator.plan.labels import FINALIZER
from baton_operator.prerequisites import ClusterFacts, Refused, missing, parsed, planned, served_kinds
from baton_operator.recorder import EventRecorder
from baton_operator.status import Seen, as_written, observed, refused

log = logging.getLogger("baton.operator.reconcile")

_PATIENT = frozenset({
    "PodsStarting", "Fetching", "Loading", "Waiting", "NotRegistered", "TransportNotProved", "WaitingForWorkers",
})  # fmt: skip
"""Reasons that every start goes through: no warning is due."""
_PASS_S = 60.0  # longest pass; the API's own deadlines are far shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`gone`: there is nothing to look after. `settled`: only a change will bring news. `ready`: as the status says."""

    gone: bool = False
    settled: bool = False
    ready: bool = False
    profile: str = ""


class Reconciler:
    """One per process; safe to run for several services at once, for one service only once at a time."""

    def __init__(
        self,
        client: KubeClient,
        recorder: EventRecorder,
        *,
        facts: Callable[[], ClusterFacts],
        wall: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._recorder = recorder
        self._applier = Applier(client)
        self._facts = facts
        self._wall = wall

    async def reconcile(self, namespace: str, name: str) -> Outcome:
        """Raises BatonError when the pass should be tried again."""
        async with asyncio.timeout(_PASS_S):
            service = await self._client.get(INFERENCE_SERVICE, namespace, name)
            if service is None:
                return Outcome(gone=True)
            if text(service, "metadata", "deletionTimestamp"):
                return await self._clean_up(namespace, name, service)
            if FINALIZER not in texts(service, "metadata", "finalizers"):
                service = await self._set_finalizers(service, [*texts(service, "metadata", "finalizers"), FINALIZER])
            try:
                return await self._converge(namespace, name, service)
            except (Refused, NameTaken) as error:
                reason = error.reason if isinstance(error, Refused) else "NameTaken"
                return await self._refuse(service, Finding(status="False", reason=reason, message=error.message))
            except KubeError as error:
                if not error.refused:
                    raise
                message = f"{error.message}; check the permissions of the operator"
                return await self._refuse(service, Finding(status="False", reason="ApiRefused", message=message))

    async def _converge(self, namespace: str, name: str, service: Object) -> Outcome:
        facts = self._facts()
        plan = await planned(self._client, parsed(service), facts.platform)
        served = await served_kinds(self._client, plan, facts)
        wanted = desired(plan, served=served)
        uid = text(service, "metadata", "uid")
        live = await self._applier.live(namespace, name, uid, served=served)
        changes = await self._applier.converge(wanted.children, live, uid)
        if changes.refused:
            raise Refused("ApplyFailed", f"the API server refuses {changes.refused[0]}; correct the service")
        if changes.applied or changes.deleted:
            log.info(
                "applied %d, deleted %d objects", len(changes.applied), len(changes.deleted),
                extra={"namespace": namespace, "service": name, "revision": wanted.revision},
            )  # fmt: skip
            live = await self._applier.live(namespace, name, uid, served=served)
        replicas = {part: integer(item, "spec", "replicas") for part, item in live.deployments().items()}
        for step in scale_steps(plan, replicas):
            await self._applier.scale(namespace, step)
        # of several things one condition waits for, the first is told
        absent = dict(reversed(await missing(self._client, plan, served)))
        seen = Seen(deployments=live.deployments(), pods=live.pods, missing=absent)
        return await self._report(service, plan, wanted, seen, changes)

    async def _report(
        self, service: Object, plan: Blueprint, wanted: Desired, seen: Seen, changes: Changes
    ) -> Outcome:
        status = observed(
            plan,
            wanted,
            seen,
            generation=integer(service, "metadata", "generation"),
            previous=mapping(service, "status"),
            now=self._now(),
        )
        await self._write_status(service, status)
        ready = _condition(status, ConditionType.READY).status == "True"
        return Outcome(settled=not seen.missing and not changes.applied, ready=ready, profile=_profile_name(service))

    async def _refuse(self, service: Object, finding: Finding) -> Outcome:
        status = refused(
            finding,
            generation=integer(service, "metadata", "generation"),
            previous=mapping(service, "status"),
            now=self._now(),
        )
        await self._write_status(service, status)
        return Outcome(settled=False, ready=False, profile=_profile_name(service))

    async def _write_status(self, service: Object, status: ServiceStatus) -> None:
        written, before = as_written(status), mapping(service, "status")
        if canonical(written) == canonical(before):
            return
        namespace, name = text(service, "metadata", "namespace"), text(service, "metadata", "name")
        manifest: Object = {
            "apiVersion": INFERENCE_SERVICE.api_version, "kind": INFERENCE_SERVICE.kind,
            "metadata": {"name": name, "namespace": namespace, "uid": text(service, "metadata", "uid")},
            "status": written,
        }  # fmt: skip
        await self._client.apply(INFERENCE_SERVICE, namespace, name, manifest, subresource="status")
        await self._tell_changes(service, before, status)

    async def _tell_changes(self, service: Object, before: Object, status: ServiceStatus) -> None:
        """Events for a changed Ready, and for each condition that turned bad in a new way."""
        old = {text(item, "type"): item for item in objects(before, "conditions")}
        ready = _condition(status, ConditionType.READY)
        if ready.status == "True" and text(old.get("Ready"), "status") != "True":
            await self._recorder.tell(service, "Normal", ready.reason, ready.message)
        for condition in status.conditions:
            if condition.type in ("Ready", "Progressing") or condition.status != "False":
                continue
            if condition.reason not in _PATIENT and text(old.get(condition.type), "reason") != condition.reason:
                await self._recorder.tell(service, "Warning", condition.reason, condition.message)

    async def _clean_up(self, namespace: str, name: str, service: Object) -> Outcome:
        """Children first; the service itself goes when none is left."""
        finalizers = texts(service, "metadata", "finalizers")
        if FINALIZER not in finalizers:
            return Outcome(gone=True)
        uid = text(service, "metadata", "uid")
        live = await self._applier.live(namespace, name, uid, served=self._facts().served)
        if await self._applier.remove_all(live):
            return Outcome(settled=False)
        await self._set_finalizers(service, [item for item in finalizers if item != FINALIZER])
        self._recorder.forget(uid)
        log.info("cleaned up", extra={"namespace": namespace, "service": name})
        return Outcome(gone=True)

    async def _set_finalizers(self, service: Object, finalizers: Collection[str]) -> Object:
        """Conflict when the service changed meanwhile: the next pass sees how."""
        namespace, name = text(service, "metadata", "namespace"), text(service, "metadata", "name")
        version = text(service, "metadata", "resourceVersion")
        patch: Object = {"metadata": {"finalizers": list(finalizers), "resourceVersion": version}}
        return await self._client.merge(INFERENCE_SERVICE, namespace, name, patch)

    def _now(self) -> str:
        return self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _profile_name(service: Object) -> str:
    return text(service, "spec", "profile")


def _condition(status: ServiceStatus, kind: ConditionType) -> Finding:
    found = next(item for item in status.conditions if item.type == kind.value)
    return Finding(status=found.status, reason=found.reason, message=found.message)
