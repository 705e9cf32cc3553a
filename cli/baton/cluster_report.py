"""What there is to say about a service in a cluster, from its InferenceService and its pods. Pure.

Ready here is what a user may rely on: the operator's word *about the present spec*. A status that speaks of an older
generation, or none at all, is not Ready, whatever it says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.objects import Object, integer, mapping, objects, text
from baton_operator.api import ConditionType
from baton_operator.plan.labels import REVISION_LABEL, ROLE_LABEL, SERVICE_ANNOTATION, Component
from baton_operator.trouble import pod_trouble

_GATES = {
    REGISTERED_GATE: ("NotRegistered", "no router has it in its list yet"),
    TRANSPORT_GATE: ("TransportNotProved", "no KV has crossed to or from a worker of the other role yet"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """Pods of one role: asked for, of the updated revision, of those ready, of those known to a router."""

    role: str
    desired: int
    updated: int
    ready: int
    routable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionReport:
    type: str
    status: str
    reason: str
    message: str
    since: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodReport:
    """`reason` and `message`: why the pod does not work, and what to do; empty when it does, or only needs time."""

    name: str
    role: str
    revision: str
    state: str
    ready: bool
    restarts: int
    reason: str = ""
    message: str = ""
    transport: str = ""  # what the probe of this prefill pod found, in its own words


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceReport:
    namespace: str
    name: str
    model: str
    profile: str
    ready: bool
    reason: str
    message: str
    since: str
    url: str
    current_revision: str
    updated_revision: str
    pools: tuple[PoolReport, ...]
    conditions: tuple[ConditionReport, ...]
    pods: tuple[PodReport, ...]


def reports(services: Iterable[Object], pods: Iterable[Object]) -> tuple[ServiceReport, ...]:
    """`pods`: of any service; each goes to its own."""
    owned: dict[tuple[str, str], list[Object]] = {}
    for pod in pods:
        service = text(pod, "metadata", "annotations", SERVICE_ANNOTATION)
        owned.setdefault((text(pod, "metadata", "namespace"), service), []).append(pod)
    return tuple(report(item, owned.get(_key(item), ())) for item in sorted(services, key=_key))


def report(service: Object, pods: Iterable[Object]) -> ServiceReport:
    """`pods`: those of this service."""
    status = mapping(service, "status")
    conditions = _conditions(status)
    ready, reason, message = _verdict(service, conditions)
    namespace, name = _key(service)
    return ServiceReport(
        namespace=namespace, name=name,
        model=text(service, "spec", "model", "uri"), profile=text(service, "spec", "profile") or "cpu",
        ready=ready, reason=reason, message=message,
        since=next((item.since for item in conditions if item.type == ConditionType.READY), ""),
        url=text(status, "url"),
        current_revision=text(status, "currentRevision"), updated_revision=text(status, "updatedRevision"),
        pools=tuple(_pool(role, pool) for role in Component if (pool := mapping(status, "roles", role))),
        conditions=conditions,
        pods=tuple(pod_report(pod) for pod in sorted(pods, key=lambda pod: text(pod, "metadata", "name"))),
    )  # fmt: skip


def pod_report(pod: Object) -> PodReport:
    statuses = objects(pod, "status", "containerStatuses")
    conditions = {text(item, "type"): item for item in objects(pod, "status", "conditions")}
    ready = text(conditions.get("Ready", {}), "status") == "True"
    reason, message = _trouble(pod, conditions, ready)
    transport = conditions.get(TRANSPORT_GATE, {})
    return PodReport(
        name=text(pod, "metadata", "name"),
        role=text(pod, "metadata", "labels", ROLE_LABEL),
        revision=text(pod, "metadata", "labels", REVISION_LABEL),
        state=_state(pod, ready), ready=ready,
        restarts=sum(integer(status, "restartCount") for status in statuses),
        reason=reason, message=message,
        transport=text(transport, "message") or text(transport, "reason"),
    )  # fmt: skip


def _key(service: Object) -> tuple[str, str]:
    return text(service, "metadata", "namespace"), text(service, "metadata", "name")


def _verdict(service: Object, conditions: Iterable[ConditionReport]) -> tuple[bool, str, str]:
    if text(service, "metadata", "deletionTimestamp"):
        return False, "Deleting", "the operator is removing what belongs to it"
    found = next((item for item in conditions if item.type == ConditionType.READY), None)
    if found is None:
        return False, "NotSeen", "no operator has looked at it; is one there? kubectl -n baton-system get pods"
    if integer(service, "status", "observedGeneration") < integer(service, "metadata", "generation"):
        message = "the operator has not taken in the last change yet; if that stays so, see its log"
        return False, "StatusOutdated", message
    return found.status == "True", found.reason, found.message


def _conditions(status: Object) -> tuple[ConditionReport, ...]:
    return tuple(
        ConditionReport(
            type=text(item, "type"), status=text(item, "status"), reason=text(item, "reason"),
            message=text(item, "message"), since=text(item, "lastTransitionTime"),
        )
        for item in objects(status, "conditions")
    )  # fmt: skip


def _pool(role: Component, status: Object) -> PoolReport:
    return PoolReport(
        role=role.value,
        desired=integer(status, "desired"), updated=integer(status, "updated"),
        ready=integer(status, "ready"), routable=integer(status, "routable"),
    )  # fmt: skip


def _state(pod: Object, ready: bool) -> str:
    if text(pod, "metadata", "deletionTimestamp"):
        return "stopping"
    if ready:
        return "ready"
    statuses = (*objects(pod, "status", "initContainerStatuses"), *objects(pod, "status", "containerStatuses"))
    waiting = [reason for status in statuses if (reason := text(status, "state", "waiting", "reason"))]
    return next(iter(waiting), "") or text(pod, "status", "phase").lower() or "unknown"


def _trouble(pod: Object, conditions: dict[str, Object], ready: bool) -> tuple[str, str]:
    """A cause that the pod itself shows; else a gate that keeps it from being ready."""
    if found := pod_trouble(pod):
        return found.reason, found.message
    if text(pod, "status", "phase") == "Failed":
        return text(pod, "status", "reason") or "Failed", text(pod, "status", "message")
    if ready or text(conditions.get("ContainersReady", {}), "status") != "True":
        return "", ""
    for gate in objects(pod, "spec", "readinessGates"):
        kind = text(gate, "conditionType")
        condition = conditions.get(kind, {})
        if text(condition, "status") != "True":
            reason, message = _GATES.get(kind, ("GateClosed", f"gate {kind} is not set"))
            return reason, text(condition, "message") or message
    return "", ""
