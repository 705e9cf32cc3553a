"""What the operator says about a service, from what it wants and what it sees. Pure; the time is passed in as text.

Ready counts pods of the *updated* revision only: old pods that still answer make nothing Ready. Conditions come in the
order in which they become true, and `Ready` repeats reason and message of the first that is not. A condition keeps its
lastTransitionTime until its status changes, so an unchanged service gives an unchanged status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from baton_common.kube.objects import Object, integer, mapping, objects, text
from baton_operator.api import Condition, ConditionType, RolesStatus, RoleStatus, ServiceStatus
from baton_operator.finding import Finding
from baton_operator.gating import Group, runs, transport, waiting
from baton_operator.plan.blueprint import Blueprint, Pool
from baton_operator.plan.children import Desired
from baton_operator.plan.labels import REVISION_LABEL, WORKERS, Component, role_selector
from baton_operator.plan.names import child_name
from baton_operator.plan.pods import FETCH_CONTAINER
from baton_operator.trouble import first_trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What lives in the cluster. `missing`: findings about things that a user has to make, by condition."""

    deployments: Mapping[Component, Object] = field(default_factory=dict)
    pods: Mapping[Component, tuple[Object, ...]] = field(default_factory=dict)
    missing: Mapping[ConditionType, Finding] = field(default_factory=dict)


def refused(finding: Finding, *, generation: int, previous: Object, now: str) -> ServiceStatus:
    """Of a service that cannot be planned. What runs from before goes on; the status says nothing new about it."""
    unknown = Finding(status="Unknown", reason="NotAccepted", message="the service is not accepted, see Accepted")
    findings = dict.fromkeys(ConditionType, unknown)
    findings[ConditionType.ACCEPTED] = finding
    findings[ConditionType.PROGRESSING] = Finding(status="False", reason=finding.reason, message=finding.message)
    findings[ConditionType.READY] = Finding(status="False", reason=finding.reason, message=finding.message)
    kept = {name: previous[name] for name in ("roles", "url", "currentRevision", "updatedRevision") if name in previous}
    base = ServiceStatus.model_validate(kept)
    return base.model_copy(
        update={"observed_generation": generation, "conditions": _dated(findings, generation, previous, now)}
    )


def observed(
    plan: Blueprint, wanted: Desired, seen: Seen, *, generation: int, previous: Object, now: str
) -> ServiceStatus:
    """Of a service whose objects are applied."""
    groups = {pool.component: _group(wanted, seen, pool) for pool in plan.pools}
    roles = {part: _role(plan, group) for part, group in groups.items()}
    findings = _findings(plan, wanted, seen, groups)
    complete = findings[ConditionType.READY].status == "True"
    return ServiceStatus(
        observed_generation=generation,
        conditions=_dated(findings, generation, previous, now),
        roles=RolesStatus(**{component.value: role for component, role in roles.items()}),
        url=url_of(plan),
        current_revision=wanted.revision if complete else text(previous, "currentRevision") or None,
        updated_revision=wanted.revision,
    )


def as_written(status: ServiceStatus) -> Object:
    """In the form of the API server."""
    dumped: Object = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dumped


def url_of(plan: Blueprint) -> str:
    """Where clients reach the service; from outside the cluster if there is a way."""
    inside = f"http://{child_name(plan.name)}.{plan.namespace}.svc:{plan.endpoint.port}"
    return plan.endpoint.public_url or inside


def _group(wanted: Desired, seen: Seen, pool: Pool) -> Group:
    deployment = seen.deployments.get(pool.component, {})
    asked = pool.scale.first if pool.scale.fixed is not None else integer(deployment, "spec", "replicas")
    return Group(component=pool.component, asked=asked, pods=_current(wanted, seen, pool.component))


def _role(plan: Blueprint, group: Group) -> RoleStatus:
    selector = ",".join(f"{key}={value}" for key, value in role_selector(plan.name, group.component).items())
    return RoleStatus.of(
        desired=group.asked, updated=len(group.pods), ready=group.ready, routable=group.routable, selector=selector
    )


def _current(wanted: Desired, seen: Seen, component: Component) -> list[Object]:
    """Pods of the updated revision that are not on their way out."""
    return [
        pod
        for pod in seen.pods.get(component, ())
        if text(pod, "metadata", "labels", REVISION_LABEL) == wanted.revisions[component]
        and not text(pod, "metadata", "deletionTimestamp")
        and text(pod, "status", "phase") not in ("Succeeded", "Failed")
    ]


def _findings(
    plan: Blueprint, wanted: Desired, seen: Seen, groups: Mapping[Component, Group]
) -> dict[ConditionType, Finding]:
    decoders = [pool.component for pool in plan.workers if pool.component is not Component.PREFILL]
    prefill = [pool.component for pool in plan.workers if pool.component is Component.PREFILL]
    found = {
        ConditionType.ACCEPTED: Finding(status="True", reason="Valid", message="spec and profile fit together"),
        ConditionType.MODEL_READY: _model(plan, groups),
        ConditionType.PREFILL_READY: _pods_ready(plan, prefill, seen, groups),
        ConditionType.DECODE_READY: _pods_ready(plan, decoders, seen, groups),
        ConditionType.ROUTER_READY: _pods_ready(plan, [Component.ROUTER], seen, groups),
        ConditionType.TRANSPORT_READY: _transport(groups),
        **seen.missing,
    }
    blocking = [item for kind, item in found.items() if item.status == "False"]
    # no probe has been reported yet: that alone says nothing against serving
    waiting = [found[kind] for kind in found if found[kind].status == "Unknown" and kind != "TransportReady"]
    worst = next(iter((*blocking, *waiting)), None)
    found[ConditionType.PROGRESSING] = _progress(seen, groups, worst)
    if worst is None:
        found[ConditionType.READY] = Finding(status="True", reason="Serving", message=f"serving at {url_of(plan)}")
    else:
        found[ConditionType.READY] = Finding(status="False", reason=worst.reason, message=worst.message)
    return {kind: found[kind] for kind in ConditionType}


def _pods_ready(
    plan: Blueprint, components: Iterable[Component], seen: Seen, groups: Mapping[Component, Group]
) -> Finding:
    parts = [groups[component] for component in components]
    asked = sum(part.asked for part in parts)
    names = " and ".join(part.component.value for part in parts)
    made = all(part.component in seen.deployments for part in parts)
    if asked == 0 and made:
        return Finding(status="True", reason="NotUsed", message=f"no {names or 'prefill'} workers are asked for")
    behind = [part for part in parts if part.component not in seen.deployments or part.ready < part.asked]
    if not behind:
        return Finding(status="True", reason="PodsReady", message=f"{asked} of {asked} {names} pods ready")
    for part in behind:
        if stuck := _stuck(part, seen):
            return stuck
    logs = f"kubectl logs -n {plan.namespace} deploy/{child_name(plan.name, Component.ROUTER.value)}"
    return waiting(behind[0], routers=groups[Component.ROUTER], logs=logs)


def _stuck(group: Group, seen: Seen) -> Finding | None:
    """A cause that time alone does not heal."""
    name = group.component.value
    if trouble := first_trouble(group.pods, fetching=False):
        return Finding(status="False", reason=trouble.reason, message=trouble.message)
    for condition in objects(seen.deployments.get(group.component, {}), "status", "conditions"):
        if text(condition, "type") == "ReplicaFailure" and text(condition, "status") == "True":
            message = f"pods of {name} are refused: {text(condition, 'message')}; correct the podTemplate, "
            return Finding(status="False", reason="PodsRefused", message=message + "the quota or the policy")
        if text(condition, "reason") == "ProgressDeadlineExceeded":
            message = f"{name} makes no progress: {text(condition, 'message')}; see `kubectl describe pods`"
            return Finding(status="False", reason="NoProgress", message=message)
    return None


def _model(plan: Blueprint, groups: Mapping[Component, Group]) -> Finding:
    # routers fetch a tokeniser, and may fail at that too
    if trouble := first_trouble((pod for group in groups.values() for pod in group.pods), fetching=True):
        return Finding(status="False", reason=trouble.reason, message=trouble.message)
    workers = [(part, pod) for part, group in groups.items() if part in WORKERS for pod in group.pods]
    if not workers:
        return Finding(status="Unknown", reason="NoPods", message="no worker pod looks for the model yet")
    # loaded before it is Ready: that also takes a router
    if any(runs(pod, part) for part, pod in workers):
        return Finding(status="True", reason="Loaded", message=f"{plan.model.uri} is loaded")
    if any(_fetching(pod) for _, pod in workers):
        return Finding(status="False", reason="Fetching", message=f"{plan.model.uri} is being fetched")
    if not any(mapping(status, "state", "running") for _, pod in workers for status in _containers(pod)):
        return Finding(status="False", reason="Waiting", message="no worker has started, so none has seen the model")
    return Finding(status="False", reason="Loading", message=f"{plan.model.uri} is being loaded")


def _containers(pod: Object) -> list[Object]:
    return objects(pod, "status", "containerStatuses")


def _fetching(pod: Object) -> bool:
    return any(
        text(status, "name") == FETCH_CONTAINER and bool(mapping(status, "state", "running"))
        for status in objects(pod, "status", "initContainerStatuses")
    )


def _transport(groups: Mapping[Component, Group]) -> Finding:
    prefill, decode = groups.get(Component.PREFILL), groups.get(Component.DECODE)
    if prefill is None or decode is None:
        return Finding(status="True", reason="NotUsed", message="no KV travels between pods")
    return transport(prefill, decode)


def _progress(seen: Seen, groups: Mapping[Component, Group], worst: Finding | None) -> Finding:
    updated, asked = sum(len(group.pods) for group in groups.values()), sum(group.asked for group in groups.values())
    old = sum(
        integer(seen.deployments.get(part, {}), "status", "replicas") > len(group.pods)
        for part, group in groups.items()
    )
    if worst is None and old == 0:
        return Finding(status="False", reason="Complete", message="all pods are of the updated revision and ready")
    if worst is not None and worst.reason == "NoProgress":
        return Finding(status="False", reason="NoProgress", message=worst.message)
    return Finding(status="True", reason="RollingOut", message=f"{updated} of {asked} pods are of the updated revision")


def _dated(
    findings: Mapping[ConditionType, Finding], generation: int, previous: Object, now: str
) -> list[Condition]:
    before = {text(item, "type"): item for item in objects(previous, "conditions")}
    dated: list[Condition] = []
    for kind, finding in findings.items():
        old = before.get(kind.value, {})
        same = text(old, "status") == finding.status
        since = text(old, "lastTransitionTime") if same else ""
        dated.append(
            Condition(
                type=kind.value,
                status=finding.status,
                reason=finding.reason,
                message=finding.message[:4096],
                last_transition_time=since or now,
                observed_generation=generation,
            )
        )
    return dated
