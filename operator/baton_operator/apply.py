"""Makes the cluster have the planned objects, and no others of the service: applies, prunes, hands replicas over.

Invariants: an object that already says what we want is not written to; nothing is taken from another owner; only
objects that carry the service's label *and* its uid as owner are deleted. An object whose fields a webhook keeps
rewriting is applied once and then left alone, instead of fighting for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from baton_common.kube.client import KubeClient
from baton_common.kube.errors import KubeError, NameTaken
from baton_common.kube.kinds import POD, Kind
from baton_common.kube.objects import Object, at, integer, mapping, objects, text
from baton_operator.drift import drifted
from baton_operator.kinds import CHILD_KINDS, DEPLOYMENT, INFERENCE_SERVICE, OPTIONAL_KINDS
from baton_operator.plan.child import Child, ScaleTo
from baton_operator.plan.labels import MANAGER, ROLE_LABEL, Component, service_selector

log = logging.getLogger("baton.operator.apply")

SCALE_MANAGER = f"{MANAGER}-scale"
"""Owns the replicas that we set for an autoscaler: it takes them over with its first write."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What a service has in the cluster: its own objects by (resource, name), strays of a former namesake, its pods."""

    own: Mapping[Key, Object]
    strays: tuple[tuple[Kind, Object], ...]
    pods: Mapping[Component, tuple[Object, ...]]

    def deployments(self) -> dict[Component, Object]:
        found = {}
        for (resource, _), live in self.own.items():
            role = text(live, "metadata", "labels", ROLE_LABEL)
            if resource == DEPLOYMENT.resource and role in set(Component):
                found[Component(role)] = live
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a pass did; `refused` are children that the API server will not take as they are."""

    applied: tuple[str, ...]
    deleted: tuple[str, ...]
    refused: tuple[str, ...]


class Applier:
    """One per process; keeps only what it learnt about rewritten fields."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._tolerated: dict[tuple[str, Key], tuple[str, frozenset[str]]] = {}

    async def live(self, namespace: str, service: str, uid: str, *, served: Collection[Kind]) -> Live:
        """Reads everything with the service's label."""
        kinds = [kind for kind in CHILD_KINDS if kind not in OPTIONAL_KINDS or kind in served]
        selector = service_selector(service)
        lists = await asyncio.gather(
            *(self._client.list(kind, namespace, selector=selector) for kind in (*kinds, POD))
        )
        own: dict[Key, Object] = {}
        strays: list[tuple[Kind, Object]] = []
        for kind, found in zip(kinds, lists, strict=False):
            for item in found:
                if _owned_by(item, uid):
                    own[kind.resource, text(item, "metadata", "name")] = item
                elif _left_by_namesake(item, service, uid):
                    strays.append((kind, item))
        pods: dict[Component, tuple[Object, ...]] = {}
        for component in Component:
            pods[component] = tuple(
                pod for pod in lists[-1] if text(pod, "metadata", "labels", ROLE_LABEL) == component.value
            )
        return Live(own=own, strays=tuple(strays), pods=pods)

    async def converge(self, children: Collection[Child], live: Live, uid: str) -> Changes:
        """Children in their order, then what is no longer wanted. Raises KubeError when a later try may do better."""
        applied: list[str] = []
        refused: list[str] = []
        deleted = [await self._delete(kind, item) for kind, item in live.strays]
        for child in children:
            try:
                if await self._ensure(child, live.own.get(child.key), uid):
                    applied.append(f"{child.kind.kind}/{child.name}")
            except KubeError as error:
                if not error.refused:
                    raise
                refused.append(f"{child.kind.kind} {child.name}: {error.message}")
        wanted = {child.key for child in children}
        kinds = {kind.resource: kind for kind in CHILD_KINDS}
        for key, item in live.own.items():
            if key not in wanted and not text(item, "metadata", "deletionTimestamp"):
                deleted.append(await self._delete(kinds[key[0]], item))
        return Changes(applied=tuple(applied), deleted=tuple(deleted), refused=tuple(refused))

    async def remove_all(self, live: Live) -> int:
        """Delete what is left of a service; how many objects that still is."""
        kinds = {kind.resource: kind for kind in CHILD_KINDS}
        left = [(kinds[resource], item) for (resource, _), item in live.own.items()] + list(live.strays)
        for kind, item in left:
            if not text(item, "metadata", "deletionTimestamp"):
                await self._delete(kind, item)
        return len(left)

    async def scale(self, namespace: str, step: ScaleTo) -> None:
        patch: Object = {"spec": {"replicas": step.replicas}}
        await self._client.merge(
            DEPLOYMENT, namespace, step.name, patch, subresource="scale", manager=SCALE_MANAGER
        )

    async def _ensure(self, item: Child, live: Object | None, uid: str) -> bool:
        """True when something was written."""
        if live is None:
            live = await self._client.get(item.kind, item.namespace, item.name)
            if live is not None and not _owned_by(live, uid):
                raise NameTaken(
                    f"{item.kind.kind} {item.name} exists already and belongs to something else; delete or rename it, "
                    "or rename this service"
                )
        if live is not None:
            if text(live, "metadata", "deletionTimestamp"):
                raise KubeError(f"{item.kind.kind} {item.name} is still being deleted")  # made again when it is gone
            drift = frozenset(drifted(item.manifest, live))
            if not drift or self._is_tolerated(item, drift):
                return False
            log.info("repairing %s %s", item.kind.kind, item.name, extra={"fields": sorted(drift)[:8]})
            await self._hand_over_replicas(item, live)
        written = await self._client.apply(item.kind, item.namespace, item.name, item.manifest)
        left = frozenset(drifted(item.manifest, written))
        if left:
            log.warning("%s %s is rewritten on the way in", item.kind.kind, item.name, extra={"fields": sorted(left)})
            self._tolerated[item.namespace, item.key] = (item.applied_hash, left)
        else:
            self._tolerated.pop((item.namespace, item.key), None)
        return True

    def _is_tolerated(self, item: Child, drift: frozenset[str]) -> bool:
        known_hash, fields = self._tolerated.get((item.namespace, item.key), ("", frozenset[str]()))
        return known_hash == item.applied_hash and drift <= fields

    async def _hand_over_replicas(self, item: Child, live: Object) -> None:
        """Before we stop to own the number of pods, somebody else has to: an unowned field falls back to 1."""
        ours = any(
            text(entry, "manager") == MANAGER
            and text(entry, "operation") == "Apply"
            and at(entry, "fieldsV1", "f:spec", "f:replicas") is not None
            for entry in objects(live, "metadata", "managedFields")
        )
        if item.kind is DEPLOYMENT and ours and "replicas" not in mapping(item.manifest, "spec"):
            kept: Object = {
                "apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "metadata": {"name": item.name},
                "spec": {"replicas": integer(live, "spec", "replicas")},
            }  # fmt: skip
            await self._client.apply(DEPLOYMENT, item.namespace, item.name, kept, manager=SCALE_MANAGER)

    async def _delete(self, kind: Kind, item: Object) -> str:
        name, namespace = text(item, "metadata", "name"), text(item, "metadata", "namespace")
        await self._client.delete(kind, namespace, name, uid=text(item, "metadata", "uid"))
        return f"{kind.kind}/{name}"


def _owned_by(item: Object, uid: str) -> bool:
    return any(text(owner, "uid") == uid for owner in objects(item, "metadata", "ownerReferences"))


def _left_by_namesake(item: Object, service: str, uid: str) -> bool:
    """Its owner was a service of this name that is gone; the garbage collector has not come by yet."""
    return any(
        text(owner, "kind") == INFERENCE_SERVICE.kind and text(owner, "name") == service and text(owner, "uid") != uid
        for owner in objects(item, "metadata", "ownerReferences")
    )
