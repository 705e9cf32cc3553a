"""Where a role's pods stand on their way from started to Ready, what they wait for, and where to look next. Pure.

A worker runs (model loaded), is registered by a router, and, unless it is colocated, has its transport proved with one
of the other role; then the kubelet makes it Ready. A router runs and is Ready once it has workers that fit. So the two
wait for each other, and what is said here must name the side that is behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.objects import Object, mapping, objects, text
from baton_operator.finding import Finding
from baton_operator.plan.labels import Component
from baton_operator.plan.pods import FETCH_CONTAINER, MAIN_CONTAINER


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The pods of one component that count: of the updated revision, and not on their way out."""

    component: Component
    asked: int
    pods: Sequence[Object]

    @property
    def ready(self) -> int:
        return sum(is_ready(pod) for pod in self.pods)

    @property
    def routable(self) -> int:
        return sum(is_registered(pod) for pod in self.pods)

    @property
    def running(self) -> int:
        return sum(runs(pod, self.component) for pod in self.pods)


def is_ready(pod: Object) -> bool:
    """The kubelet says so, and no gate has been taken back since."""
    return told(pod, "Ready") == "True" and all(told(pod, gate) == "True" for gate in _gates(pod))


def is_registered(pod: Object) -> bool:
    """A pod without the gate makes no such promise: being ready is all there is to know."""
    gated = REGISTERED_GATE in _gates(pod)
    return told(pod, REGISTERED_GATE if gated else "Ready") == "True"


def runs(pod: Object, component: Component) -> bool:
    """A worker whose model is loaded; a router that listens, whether it has workers or not."""
    if component is not Component.ROUTER:
        return told(pod, "ContainersReady") == "True" or is_ready(pod)
    mains = [item for item in objects(pod, "status", "containerStatuses") if text(item, "name") == MAIN_CONTAINER]
    return is_ready(pod) or any(item.get("started") is True and mapping(item, "state", "running") for item in mains)


def told(pod: Object, kind: str) -> str:
    """Status of one of the pod's conditions; empty = not set."""
    return text(_condition(pod, kind), "status")


def detail(pod: Object, kind: str) -> str:
    """Message of one of the pod's conditions."""
    return text(_condition(pod, kind), "message")


def waiting(group: Group, *, routers: Group, logs: str) -> Finding:
    """Of a group that is not complete. `logs`: the command that shows what routers say."""
    if group.component is Component.ROUTER:
        return _router(group, logs)
    name, asked = group.component.value, group.asked
    if group.running < asked:
        return _starting(group)
    run = f"{asked} of {asked} {name} pods run"
    if group.routable < asked:
        behind = next(pod for pod in group.pods if not is_registered(pod))
        pod = text(behind, "metadata", "name")
        if routers.running == 0:
            return _not_yet("NotRegistered", f"{run}, not yet registered: no router is up; see RouterReady")
        run += f", {_verb(group.routable)} registered with a router"
        if told(behind, REGISTERED_GATE) == "False":
            why = detail(behind, REGISTERED_GATE) or "the router gives no reason"
            return _not_yet("RegistrationFailed", f"{run}; pod {pod}: {why}; see `{logs}`")
        return _not_yet("NotRegistered", f"{run}; if pod {pod} stays so, see `{logs}`")
    proved = sum(TRANSPORT_GATE not in _gates(pod) or told(pod, TRANSPORT_GATE) == "True" for pod in group.pods)
    if proved < asked:
        return _not_yet(
            "TransportNotProved",
            f"{asked} of {asked} {name} pods are registered, {_verb(proved, 'has', 'have')} proved the transport of "
            "KV; see TransportReady",
        )
    return _starting(group)


def transport(prefill: Group, decode: Group) -> Finding:
    """What routers say of the hand-over of KV."""
    if prefill.asked == 0:
        return Finding(status="True", reason="NotUsed", message="no prefill workers are asked for, so no KV travels")
    probed = [pod for pod in prefill.pods if told(pod, TRANSPORT_GATE)]
    failed = [pod for pod in (*probed, *decode.pods) if told(pod, TRANSPORT_GATE) not in ("True", "")]
    if failed:
        name, why = text(failed[0], "metadata", "name"), detail(failed[0], TRANSPORT_GATE)
        return _not_yet(
            "ProbeFailed",
            f"pod {name} cannot hand over KV: {why}; let prefill pods reach the peer port of decode pods (network "
            "policies, spec.transport)",
        )
    if probed:
        figures = detail(probed[0], TRANSPORT_GATE)
        count = f"{len(probed)} prefill {'worker has' if len(probed) == 1 else 'workers have'} proved the transport"
        return Finding(status="True", reason="Probed", message=f"{count}: {figures}" if figures else count)
    behind = next((group for group in (prefill, decode) if group.routable == 0), None)
    if behind is None:
        return Finding(status="Unknown", reason="NotProbed", message="no router has probed the transport yet")
    role = behind.component.value
    message = f"not probed yet: no {role} pod is registered with a router; see {role.capitalize()}Ready"
    return Finding(status="Unknown", reason="NotProbed", message=message)


def _router(group: Group, logs: str) -> Finding:
    if group.running < group.asked:
        return _starting(group)
    return _not_yet(
        "WaitingForWorkers",
        f"{group.asked} of {group.asked} router pods run, {group.ready} of them have workers that fit together; see "
        f"PrefillReady and DecodeReady, then `{logs}`",
    )


def _starting(group: Group) -> Finding:
    name = group.component.value
    message = f"{group.ready} of {group.asked} {name} pods of the updated revision are ready"
    behind = next((pod for pod in group.pods if not is_ready(pod)), None)
    if behind is not None:
        message += f"; pod {text(behind, 'metadata', 'name')} {_doing(behind, group.component)}"
    return _not_yet("PodsStarting", message)


def _doing(pod: Object, component: Component) -> str:
    name = text(pod, "metadata", "name")
    if runs(pod, component):
        return "runs and becomes ready"
    statuses = (*objects(pod, "status", "initContainerStatuses"), *objects(pod, "status", "containerStatuses"))
    for status in statuses:
        if mapping(status, "state", "running"):
            return "fetches the model" if text(status, "name") == FETCH_CONTAINER else "has started and is not ready"
        if reason := text(status, "state", "waiting", "reason"):
            return f"waits ({reason}); if it stays so, see `kubectl describe pod {name}`"
    return f"is {text(pod, 'status', 'phase') or 'Pending'}; if it stays so, see `kubectl describe pod {name}`"


def _not_yet(reason: str, message: str) -> Finding:
    return Finding(status="False", reason=reason, message=message)


def _verb(count: int, one: str = "is", more: str = "are") -> str:
    return f"{count} {one if count == 1 else more}"


def _gates(pod: Object) -> list[str]:
    return [text(gate, "conditionType") for gate in objects(pod, "spec", "readinessGates")]


def _condition(pod: Object, kind: str) -> Object:
    conditions = objects(pod, "status", "conditions")
    return next((item for item in conditions if text(item, "type") == kind), {})
