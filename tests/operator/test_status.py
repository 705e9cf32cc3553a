"""What the operator says: one table of situations, and what a user reads in each."""

from __future__ import annotations

from typing import Any

import pytest
from support.operator_world import PLATFORM, Tree, profile_object, service_object

from baton_common.kube.objects import Object
from baton_operator.api import AcceleratorProfile, ConditionType, InferenceService
from baton_operator.finding import Finding
from baton_operator.plan.children import Desired, desired
from baton_operator.plan.intake import blueprint
from baton_operator.plan.labels import REVISION_LABEL, Component
from baton_operator.status import Seen, as_written, observed

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
PLAN = blueprint(InferenceService.parse(service_object()), AcceleratorProfile.parse(profile_object()), PLATFORM)
WANTED: Desired = desired(PLAN, served=[])
ROLES = (Component.PREFILL, Component.DECODE, Component.ROUTER)


def pod(role: Component, *, ready: bool = True, revision: str | None = None, **status: Any) -> Tree:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}, *status.pop("conditions", [])]
    return {
        "metadata": {"name": f"chat-{role}-0", "labels": {REVISION_LABEL: revision or WANTED.revisions[role]}},
        "status": {"conditions": conditions, **status},
    }


def see(**pods: list[Tree]) -> Seen:
    """Every Deployment there with its pods; a role that is not named has one ready pod."""
    there = {role: tuple(pods.get(role.value, [pod(role)])) for role in ROLES}
    deployments: dict[Component, Object] = {
        role: {"spec": {"replicas": 1}, "status": {"replicas": len(there[role])}} for role in ROLES
    }
    return Seen(deployments=deployments, pods=there)


def told(seen: Seen, previous: Object | None = None, now: str = NOW) -> Any:
    return as_written(observed(PLAN, WANTED, seen, generation=3, previous=previous or {}, now=now))


def condition(status: Any, kind: str) -> Any:
    return next(item for item in status["conditions"] if item["type"] == kind)


def container(name: str, state: Tree, **more: Any) -> Tree:
    return {"name": name, "image": "img:1", "state": state, "restartCount": 0, **more}


UNSCHEDULABLE = pod(
    Component.PREFILL, ready=False,
    conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                 "message": "0/3 nodes: Insufficient nvidia.com/gpu"}],
)  # fmt: skip
NO_IMAGE = pod(
    Component.DECODE, ready=False,
    containerStatuses=[container("main", {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})],
)  # fmt: skip
CRASHING = pod(
    Component.ROUTER, ready=False,
    containerStatuses=[
        container("main", {"waiting": {"reason": "CrashLoopBackOff"}}, restartCount=3,
                  lastState={"terminated": {"exitCode": 2, "message": "baton-router: no model at '/x'\n"}})
    ],
)  # fmt: skip
NOT_FETCHED = pod(
    Component.DECODE, ready=False,
    initContainerStatuses=[
        container("fetch-model", {"waiting": {"reason": "CrashLoopBackOff"}}, restartCount=1,
                  lastState={"terminated": {"exitCode": 1, "message": "404 no such repository"}})
    ],
)  # fmt: skip
KILLED = pod(
    Component.DECODE, ready=False,
    containerStatuses=[
        container("main", {"running": {"a": 1}}, restartCount=2,
                  lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "loading"}})
    ],
)  # fmt: skip
ENDED = pod(
    Component.DECODE, ready=False,
    containerStatuses=[
        container("main", {"waiting": {"reason": "CrashLoopBackOff"}}, restartCount=1,
                  lastState={"terminated": {"exitCode": 0, "reason": "Completed"}})
    ],
)  # fmt: skip
FETCHING = pod(Component.DECODE, ready=False, initContainerStatuses=[container("fetch-model", {"running": {"a": 1}})])


@pytest.mark.parametrize(
    ("seen", "kind", "reason", "words"),
    [
        (see(prefill=[UNSCHEDULABLE]), "PrefillReady", "Unschedulable", ["Insufficient nvidia.com/gpu", "add nodes"]),
        (see(decode=[NO_IMAGE]), "DecodeReady", "ImageUnavailable", ["img:1", "pull secrets"]),
        (see(router=[CRASHING]), "RouterReady", "Crashing", ["no model at", "kubectl logs chat-router-0 -p"]),
        (see(decode=[KILLED]), "DecodeReady", "OutOfMemory", ["pod chat-decode-0 was killed", "raise resources"]),
        (see(decode=[ENDED]), "DecodeReady", "Crashing", ["ended with status 0", "it should run on"]),
        (see(prefill=[], decode=[NOT_FETCHED]), "ModelReady", "FetchFailed", ["404 no such", "spec.model.uri"]),
        (see(prefill=[], decode=[FETCHING]), "ModelReady", "Fetching", ["hf://Qwen/Qwen3-0.6B"]),
        (see(decode=[]), "DecodeReady", "PodsStarting", ["0 of 1 decode pods"]),
    ],
)
def test_each_trouble_has_a_reason_a_remedy_and_makes_the_service_not_ready(
    seen: Seen, kind: str, reason: str, words: list[str]
) -> None:
    status = told(seen)
    found = condition(status, kind)
    assert (found["status"], found["reason"]) == ("False", reason)
    for word in words:
        assert word in found["message"]
    assert condition(status, "Ready")["status"] == "False"


def test_all_conditions_are_there_in_their_order_and_speak_of_this_generation() -> None:
    status = told(see())
    assert [item["type"] for item in status["conditions"]] == [kind.value for kind in ConditionType]
    assert {item["observedGeneration"] for item in status["conditions"]} == {3}
    assert status["observedGeneration"] == 3
    assert status["url"] == "http://chat.ns.svc:8000"


def test_ready_when_every_role_is() -> None:
    status = told(see())
    assert condition(status, "Ready") == {
        "type": "Ready", "status": "True", "reason": "Serving", "message": "serving at http://chat.ns.svc:8000",
        "lastTransitionTime": NOW, "observedGeneration": 3,
    }  # fmt: skip
    assert condition(status, "Progressing")["reason"] == "Complete"
    assert status["currentRevision"] == status["updatedRevision"] == WANTED.revision


def test_pods_of_an_old_revision_and_pods_that_leave_do_not_count() -> None:
    leaving = pod(Component.DECODE)
    leaving["metadata"]["deletionTimestamp"] = NOW
    status = told(see(decode=[pod(Component.DECODE, revision="old"), leaving]), {"currentRevision": "before"})
    assert status["roles"]["decode"] | {"selector": ""} == {
        "desired": 1, "updated": 0, "ready": 0, "routable": 0, "summary": "0/1", "selector": "",
    }  # fmt: skip
    assert condition(status, "Ready")["status"] == "False"
    assert condition(status, "Progressing")["status"] == "True"
    assert status["currentRevision"] == "before"


def test_old_pods_beside_ready_new_ones_are_progress_and_ready() -> None:
    status = told(see(decode=[pod(Component.DECODE), pod(Component.DECODE, revision="old")]))
    assert condition(status, "Ready")["status"] == "True"
    assert condition(status, "Progressing")["status"] == "True"


@pytest.mark.parametrize(("gate", "expected"), [("True", "True"), ("False", "False"), ("", "Unknown")])
def test_transport_is_what_prefill_workers_have_proved(gate: str, expected: str) -> None:
    proof = [{"type": "serving.baton.dev/kv-transport", "status": gate, "message": "no route"}] if gate else []
    status = told(see(prefill=[pod(Component.PREFILL, conditions=proof)]))
    assert condition(status, "TransportReady")["status"] == expected
    assert condition(status, "Ready")["status"] == ("False" if expected == "False" else "True")


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    first = told(see())
    assert told(see(), first, LATER) == first
    changed = told(see(decode=[]), first, LATER)
    assert condition(changed, "DecodeReady")["lastTransitionTime"] == LATER
    assert condition(changed, "PrefillReady")["lastTransitionTime"] == NOW


def test_refused_pods_are_told_with_the_reason_of_the_api_server() -> None:
    seen = see(decode=[])
    failure = {"type": "ReplicaFailure", "status": "True", "message": "violates PodSecurity"}
    deployments = {**seen.deployments, Component.DECODE: {"spec": {"replicas": 1}, "status": {"conditions": [failure]}}}
    status = told(Seen(deployments=deployments, pods=seen.pods))
    assert condition(status, "DecodeReady")["reason"] == "PodsRefused"
    assert "violates PodSecurity" in condition(status, "DecodeReady")["message"]


def test_what_the_user_has_to_make_stands_in_its_condition() -> None:
    missing = {ConditionType.ROUTER_READY: Finding(status="False", reason="SecretNotFound", message="no Secret keys")}
    seen = see()
    status = told(Seen(deployments=seen.deployments, pods=seen.pods, missing=missing))
    assert condition(status, "RouterReady")["reason"] == condition(status, "Ready")["reason"] == "SecretNotFound"
