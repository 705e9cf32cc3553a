"""Readiness gates: what the status says while workers and routers wait for each other, in any order of events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.operator_world import PLATFORM, Tree, profile_object, service_object

from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.objects import Object
from baton_operator.api import AcceleratorProfile, ConditionType, InferenceService
from baton_operator.plan.children import desired
from baton_operator.plan.intake import blueprint
from baton_operator.plan.labels import REVISION_LABEL, Component
from baton_operator.status import Seen, as_written, observed

GATES = {Component.PREFILL: [REGISTERED_GATE, TRANSPORT_GATE], Component.DECODE: [REGISTERED_GATE, TRANSPORT_GATE]}
ROLES = (Component.PREFILL, Component.DECODE, Component.ROUTER)


@dataclass
class Pod:
    """One pod as its kubelet and its router see it. `gates`: what a router has said; absent = nothing yet."""

    role: Component
    index: int
    runs: bool = False
    gates: dict[str, str] = field(default_factory=dict)
    message: str = ""

    def ready(self, *, paired: bool) -> bool:
        if self.role is Component.ROUTER:
            return self.runs and paired
        return self.runs and all(self.gates.get(gate) == "True" for gate in GATES[self.role])

    def manifest(self, revision: str, *, paired: bool) -> Tree:
        conditions = [
            {"type": "Ready", "status": str(self.ready(paired=paired))},
            {"type": "ContainersReady", "status": str(self.runs and (paired or self.role is not Component.ROUTER))},
            *({"type": kind, "status": value, "message": self.message} for kind, value in self.gates.items()),
        ]
        state = {"running": {"startedAt": "now"}} if self.runs else {"waiting": {"reason": "ContainerCreating"}}
        return {
            "metadata": {"name": f"chat-{self.role}-{self.index}", "labels": {REVISION_LABEL: revision}},
            "spec": {"readinessGates": [{"conditionType": gate} for gate in GATES.get(self.role, [])]},
            "status": {
                "phase": "Running" if self.runs else "Pending", "conditions": conditions,
                "containerStatuses": [{"name": "main", "state": state, "started": self.runs, "restartCount": 0}],
            },
        }  # fmt: skip


class Service:
    """Three prefill pods, two decode pods, one router, and the status after each look at them; one second a look."""

    def __init__(self) -> None:
        declared = service_object(prefill={"replicas": 3}, decode={"replicas": 2})
        self._plan = blueprint(
            InferenceService.parse(declared), AcceleratorProfile.parse(profile_object()), PLATFORM
        )
        self._wanted = desired(self._plan, served=[])
        counts = {Component.PREFILL: 3, Component.DECODE: 2, Component.ROUTER: 1}
        self.pods = {role: [Pod(role, index) for index in range(count)] for role, count in counts.items()}
        self.status: Any = {}
        self._now_s = 0

    def all(self, *roles: Component) -> list[Pod]:
        return [pod for role in roles or ROLES for pod in self.pods[role]]

    @property
    def paired(self) -> bool:
        """What the router's /ready says."""
        workers = [[pod.gates.get(REGISTERED_GATE) == "True" for pod in self.pods[role]] for role in GATES]
        return all(any(side) for side in workers)

    def look(self) -> Any:
        self._now_s += 1
        deployments: dict[Component, Object] = {
            role: {"spec": {"replicas": len(found)}, "status": {"replicas": len(found)}}
            for role, found in self.pods.items()
        }
        pods = {
            role: tuple(pod.manifest(self._wanted.revisions[role], paired=self.paired) for pod in found)
            for role, found in self.pods.items()
        }
        seen = Seen(deployments=deployments, pods=pods)
        now = f"2026-01-01T00:{self._now_s // 60:02d}:{self._now_s % 60:02d}Z"
        self.status = as_written(
            observed(self._plan, self._wanted, seen, generation=1, previous=self.status, now=now)
        )
        return self.status

    def condition(self, kind: str) -> Any:
        return next(item for item in self.look()["conditions"] if item["type"] == kind)


def nothing(service: Service) -> None:
    """No pod has started."""


def workers_run(service: Service) -> None:
    for pod in service.all(Component.PREFILL, Component.DECODE):
        pod.runs = True


def router_runs(service: Service) -> None:
    workers_run(service)
    service.pods[Component.ROUTER][0].runs = True


def one_registered(service: Service) -> None:
    router_runs(service)
    service.pods[Component.PREFILL][0].gates[REGISTERED_GATE] = "True"


def one_refused(service: Service) -> None:
    one_registered(service)
    pod = service.pods[Component.PREFILL][1]
    pod.gates[REGISTERED_GATE], pod.message = "False", "page_tokens 64 here, 32 there"


def all_registered(service: Service) -> None:
    router_runs(service)
    for pod in service.all(Component.PREFILL, Component.DECODE):
        pod.gates[REGISTERED_GATE] = "True"


def probe_failed(service: Service) -> None:
    all_registered(service)
    pod = service.pods[Component.PREFILL][2]
    pod.gates[TRANSPORT_GATE], pod.message = "False", "no route to 10.0.0.9:9100"


def decode_alone(service: Service) -> None:
    everything(service)
    pod = service.pods[Component.DECODE][1]
    pod.gates[TRANSPORT_GATE], pod.message = "False", "no prefill worker fits"


def everything(service: Service) -> None:
    all_registered(service)
    for pod in service.all(Component.PREFILL, Component.DECODE):
        pod.gates[TRANSPORT_GATE], pod.message = "True", "tcp, 2.1 GB/s"


@pytest.mark.parametrize(
    ("happened", "kind", "status", "reason", "words"),
    [
        (nothing, "PrefillReady", "False", "PodsStarting",
         ["0 of 3 prefill pods", "kubectl describe pod chat-prefill-0"]),
        (nothing, "TransportReady", "Unknown", "NotProbed", ["no prefill pod is registered", "see PrefillReady"]),
        (workers_run, "PrefillReady", "False", "NotRegistered",
         ["3 of 3 prefill pods run", "not yet registered: no router is up", "see RouterReady"]),
        (workers_run, "RouterReady", "False", "PodsStarting", ["0 of 1 router pods", "describe pod chat-router-0"]),
        (workers_run, "ModelReady", "True", "Loaded", []),
        (router_runs, "RouterReady", "False", "WaitingForWorkers",
         ["1 of 1 router pods run", "see PrefillReady and DecodeReady"]),
        (one_registered, "PrefillReady", "False", "NotRegistered",
         ["3 of 3 prefill pods run, 1 is registered with a router", "kubectl logs -n ns deploy/chat-router"]),
        (one_registered, "TransportReady", "Unknown", "NotProbed", ["no decode pod is registered", "see DecodeReady"]),
        (one_refused, "PrefillReady", "False", "RegistrationFailed",
         ["1 is registered", "pod chat-prefill-1", "page_tokens 64 here, 32 there"]),
        (all_registered, "PrefillReady", "False", "TransportNotProved",
         ["3 of 3 prefill pods are registered, 0 have proved", "see TransportReady"]),
        (all_registered, "DecodeReady", "False", "TransportNotProved", ["2 of 2 decode pods are registered, 0 have"]),
        (all_registered, "RouterReady", "True", "PodsReady", []),
        (all_registered, "TransportReady", "Unknown", "NotProbed", ["no router has probed"]),
        (probe_failed, "TransportReady", "False", "ProbeFailed",
         ["chat-prefill-2", "no route to 10.0.0.9:9100", "network policies"]),
        (decode_alone, "TransportReady", "False", "ProbeFailed", ["chat-decode-1", "no prefill worker fits"]),
        (decode_alone, "DecodeReady", "False", "TransportNotProved", ["1 has proved"]),
        (everything, "DecodeReady", "True", "PodsReady", []),
        (everything, "TransportReady", "True", "Probed", ["3 prefill workers", "2.1 GB/s"]),
    ],
)  # fmt: skip
def test_each_stage_says_what_is_behind_and_where_to_look(
    happened: Callable[[Service], None], kind: str, status: str, reason: str, words: list[str]
) -> None:
    service = Service()
    happened(service)
    found = service.condition(kind)
    assert (found["status"], found["reason"]) == (status, reason), found
    for word in words:
        assert word in found["message"]
    assert (service.condition("Ready")["status"] == "True") is (happened is everything)


def test_a_role_counts_what_runs_what_is_registered_and_what_is_ready() -> None:
    service = Service()
    all_registered(service)
    roles = service.look()["roles"]
    assert (roles["prefill"]["updated"], roles["prefill"]["routable"], roles["prefill"]["ready"]) == (3, 3, 0)
    assert (roles["decode"]["updated"], roles["decode"]["routable"], roles["decode"]["ready"]) == (2, 2, 0)


def test_a_gate_that_is_taken_back_ends_readiness_before_the_kubelet_has_noticed() -> None:
    service = Service()
    everything(service)
    assert service.condition("Ready")["status"] == "True"
    pod = service.pods[Component.DECODE][0]
    honest = pod.ready
    pod.gates[REGISTERED_GATE], pod.message = "False", "its stream has ended"
    pod.ready = lambda *, paired: True  # type: ignore[method-assign]
    assert service.condition("DecodeReady")["reason"] == "RegistrationFailed"
    assert service.condition("Ready")["status"] == "False"
    pod.ready = honest  # type: ignore[method-assign]


EVENTS = st.lists(st.tuples(st.sampled_from(["run", "die", "register", "lose", "prove", "fail"]), st.integers(0, 5)),
                  max_size=40)  # fmt: skip


def happen(service: Service, event: str, which: int) -> None:
    pod = service.all()[which]
    router_is_up = service.pods[Component.ROUTER][0].runs
    match event:
        case "run":
            pod.runs = True
        case "die":
            pod.runs, pod.gates = False, {}
        case "register" | "lose" if router_is_up and pod.runs and pod.role in GATES:
            pod.gates[REGISTERED_GATE] = str(event == "register")
        case "prove" | "fail" if pod.gates.get(REGISTERED_GATE) == "True" and pod.role in GATES:
            pod.gates[TRANSPORT_GATE] = str(event == "prove")


@given(events=EVENTS)
def test_any_history_of_pods_tells_the_truth_at_each_step_and_ends_ready(events: list[tuple[str, int]]) -> None:
    service = Service()
    before: dict[str, Any] = {}
    for event, which in events:
        happen(service, event, which)
        status = service.look()
        found = {item["type"]: item for item in status["conditions"]}
        assert list(found) == [kind.value for kind in ConditionType]
        truth = all(pod.ready(paired=service.paired) for pod in service.all())
        assert (found["Ready"]["status"] == "True") is truth
        for kind, item in found.items():
            assert item["message"]
            kept = kind in before and before[kind]["status"] == item["status"]
            assert kept is (kind in before and before[kind]["lastTransitionTime"] == item["lastTransitionTime"])
        assert service.look() == status  # nothing happened: nothing is written
        before = found
    everything(service)
    assert service.condition("Ready")["status"] == "True"
