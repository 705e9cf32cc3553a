"""One pass, and many: convergence, rest, repair, and restarts at every single call to the API server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_world import Crash, Tree, World, profile_object, service_object

from baton_common.kube.errors import KubeError
from baton_operator.kinds import (
    ACCELERATOR_PROFILE,
    CHILD_KINDS,
    DEPLOYMENT,
    HTTP_ROUTE,
    INFERENCE_SERVICE,
    INGRESS,
    OPTIONAL_KINDS,
    SERVICE_MONITOR,
)
from baton_operator.plan.labels import FINALIZER


def wanted(server_children: dict[str, Tree]) -> dict[str, Tree]:
    """What must be equal after any history: everything but versions and the owner's uid."""
    plain: dict[str, Tree] = {}
    for path, item in server_children.items():
        metadata = {key: item["metadata"][key] for key in ("name", "labels") if key in item["metadata"]}
        plain[path] = {**item, "metadata": metadata}
        plain[path].pop("status", None)
    return plain


async def test_a_service_gets_its_objects_and_then_nothing_is_written_for_a_hundred_passes() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    assert len(world.server.children()) == 18
    operator, before = world.operator(), len(world.server.writes)
    for _ in range(100):
        await operator.reconcile("ns", "chat")
    assert len(world.server.writes) == before


async def test_it_is_ready_when_pods_of_the_updated_revision_are() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    assert world.condition("Ready")["status"] == "False"
    world.make_pods()
    outcome = await world.settle()
    assert outcome.ready
    assert outcome.settled
    status = world.status()
    assert status["currentRevision"] == status["updatedRevision"]
    assert status["roles"]["decode"]["summary"] == "1/1"


async def test_old_pods_that_still_serve_make_a_new_revision_not_ready() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    world.make_pods()
    await world.settle()
    first = world.status()["currentRevision"]
    world.server.put(INFERENCE_SERVICE, service_object(model={"uri": "hf://Qwen/Qwen3-0.6B", "contextTokens": 512}))
    # contextTokens changes the settings, and with them every pod
    await world.settle()
    assert world.condition("Ready")["status"] == "False"
    assert world.status()["currentRevision"] == first
    assert world.status()["updatedRevision"] != first
    world.make_pods()
    await world.settle()
    assert world.status()["currentRevision"] == world.status()["updatedRevision"]


@pytest.mark.parametrize("plural", [kind.plural for kind in CHILD_KINDS if kind not in (*OPTIONAL_KINDS, INGRESS)])
async def test_a_child_that_somebody_deletes_comes_back(plural: str) -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    before = wanted(world.server.children())
    gone = next(path for path in before if path.split("/")[-2] == plural)
    world.server.delete(gone)
    await world.settle()
    assert wanted(world.server.children()) == before


async def test_an_edited_field_of_ours_is_repaired_and_a_foreign_one_is_left_alone() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    deployment = world.deployment("decode")
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = "evil:1"
    deployment["metadata"]["annotations"]["somebody/else"] = "yes"
    await world.settle()
    assert world.deployment("decode")["spec"]["template"]["spec"]["containers"][0]["image"] == "local/worker:1-cpu"
    assert world.deployment("decode")["metadata"]["annotations"]["somebody/else"] == "yes"


async def test_what_is_no_longer_wanted_is_deleted() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    world.server.put(INFERENCE_SERVICE, service_object(colocated={"replicas": 2}))
    await world.settle()
    names = {item["metadata"]["name"] for item in world.server.children().values() if item["kind"] == "Deployment"}
    assert names == {"chat-colocated", "chat-router"}


async def test_a_foreign_object_of_the_same_name_is_never_taken() -> None:
    world = World()
    head = {"name": "chat-decode", "namespace": "ns"}
    world.server.put(DEPLOYMENT, {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": head})
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    assert "spec" not in world.deployment("decode")
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NameTaken")
    assert "chat-decode" in accepted["message"]
    world.server.delete(DEPLOYMENT.path("ns", "chat-decode"))
    await world.settle()
    assert world.condition("Accepted")["status"] == "True"


async def test_an_unknown_profile_is_told_with_the_ones_that_exist_and_heals() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object(profile="tpu"))
    outcome = await world.settle()
    assert not outcome.settled
    for kind in ("Accepted", "Ready"):
        assert world.condition(kind)["reason"] == "ProfileNotFound"
        assert "tpu" in world.condition(kind)["message"]
        assert "cpu" in world.condition(kind)["message"]
    assert world.server.children() == {}
    world.server.put(ACCELERATOR_PROFILE, profile_object("tpu"))
    await world.settle()
    assert world.condition("Accepted")["status"] == "True"


async def test_a_missing_secret_and_claim_are_told_while_everything_else_is_made() -> None:
    world = World()
    world.server.put(
        INFERENCE_SERVICE, service_object(model={"uri": "pvc://weights/llama"}, router={"apiKeysSecret": "keys"})
    )
    await world.settle()
    assert world.condition("ModelReady")["reason"] == "ClaimNotFound"
    assert world.condition("RouterReady")["reason"] == "SecretNotFound"
    assert "spec.router.apiKeysSecret" in world.condition("RouterReady")["message"]
    assert world.condition("Accepted")["status"] == "True"
    assert world.deployment("decode")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"profile": "gpu", "parallelism": {"tensor": 8}}, ["prefill", "tensor 8", "set parallelism.tensor to 1"]),
        ({"profile": "gpu", "decode": {"parallelism": {"tensor": 2}}}, ["decode", "set parallelism.tensor to 1"]),
    ],
)
async def test_what_this_release_cannot_run_is_told_before_any_pod_is_made(spec: Tree, words: list[str]) -> None:
    world = World()
    gpu = {"resource": "nvidia.com/gpu", "perNode": 8}
    world.server.put(ACCELERATOR_PROFILE, profile_object("gpu", device="cuda", gpu=gpu))
    world.server.put(INFERENCE_SERVICE, service_object(**spec))
    await world.settle()
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NotSupported")
    for word in words:
        assert word in accepted["message"]
    assert world.condition("Ready")["message"] == accepted["message"]
    assert world.server.children() == {}
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    assert world.condition("Accepted")["status"] == "True"


async def test_a_number_format_that_differs_between_roles_is_told() -> None:
    env = {"name": "BATON_ENGINE_DTYPE", "value": "float32"}
    patch = {"podTemplate": {"spec": {"containers": [{"name": "main", "env": [env]}]}}}
    world = World()
    model = {"uri": "hf://Qwen/Qwen3-0.6B", "dtype": "bfloat16"}
    world.server.put(INFERENCE_SERVICE, service_object(model=model, decode=patch))
    await world.settle()
    assert world.condition("Accepted")["reason"] == "KvMismatch"
    assert "prefill says bfloat16 and decode says float32" in world.condition("Accepted")["message"]
    world.server.put(INFERENCE_SERVICE, service_object(model=model))
    await world.settle()
    assert world.condition("Accepted")["status"] == "True"


async def test_a_route_of_a_kind_that_the_cluster_lacks_is_told_and_made_when_the_kind_comes() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object(router={"httpRoute": {"gateway": "front"}}))
    outcome = await world.settle()
    assert not outcome.settled
    assert world.condition("RouterReady")["reason"] == "KindNotServed"
    assert "install the Gateway API" in world.condition("RouterReady")["message"]
    world.server.store[HTTP_ROUTE.path().rpartition("/")[0]] = {
        "metadata": {}, "resources": [{"name": HTTP_ROUTE.plural}],
    }  # fmt: skip
    await world.settle()
    assert world.server.get(HTTP_ROUTE, "chat")
    assert world.condition("RouterReady")["reason"] == "PodsStarting"


async def test_a_missing_certificate_of_the_ingress_is_told() -> None:
    world = World()
    world.server.put(
        INFERENCE_SERVICE, service_object(router={"ingress": {"host": "chat.example.com", "tlsSecret": "cert"}})
    )
    await world.settle()
    assert world.condition("RouterReady")["reason"] == "SecretNotFound"
    assert "spec.router.ingress.tlsSecret" in world.condition("RouterReady")["message"]


async def test_deletion_removes_the_children_first_and_then_the_finaliser() -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    path = INFERENCE_SERVICE.path("ns", "chat")
    assert world.server.store[path]["metadata"]["finalizers"] == [FINALIZER]
    world.server.delete(path)
    operator = world.operator()
    await operator.reconcile("ns", "chat")
    assert path in world.server.store  # children were there: one more look
    assert (await world.settle(operator=operator)).gone
    assert world.server.children() == {}
    assert path not in world.server.store


@pytest.mark.parametrize("role", ["prefill", "decode", "colocated"])
async def test_the_replicas_of_an_autoscaler_are_left_alone_within_bounds(role: str) -> None:
    world = World()
    world.server.put(INFERENCE_SERVICE, service_object(**{role: {"minReplicas": 2, "maxReplicas": 5}}))
    await world.settle()
    assert world.deployment(role)["spec"]["replicas"] == 2
    world.deployment(role)["spec"]["replicas"] = 4
    before = len(world.server.writes)
    operator = world.operator()
    for _ in range(10):
        await operator.reconcile("ns", "chat")
    assert world.deployment(role)["spec"]["replicas"] == 4
    assert [call for call in world.server.writes[before:] if "deployments" in call[1]] == []
    world.deployment(role)["spec"]["replicas"] = 9
    await world.settle()
    assert world.deployment(role)["spec"]["replicas"] == 5


async def test_monitors_appear_only_where_their_kind_is_served() -> None:
    world = World(served=frozenset([SERVICE_MONITOR]))
    world.server.put(INFERENCE_SERVICE, service_object())
    await world.settle()
    kinds = {item["kind"] for item in world.server.children().values()}
    assert "ServiceMonitor" in kinds
    assert "PodMonitor" not in kinds


async def test_a_webhook_that_rewrites_a_field_is_not_fought() -> None:
    world = World()

    def rewrite(verb: str, path: str) -> None:
        if verb == "apply" and path.endswith("deployments/chat-decode"):
            world.server.store[path]["spec"]["template"]["spec"]["enableServiceLinks"] = True

    world.server.after = rewrite
    world.server.put(INFERENCE_SERVICE, service_object())
    operator = world.operator()
    await world.settle(operator=operator)
    answered = [call for call in world.server.writes if call[1].endswith("deployments/chat-decode")]
    assert len(answered) <= 2


@pytest.mark.parametrize("after", [False, True], ids=["before the effect", "after the effect"])
@pytest.mark.parametrize("end", ["create", "change", "delete"])
async def test_an_operator_killed_at_any_call_is_made_good_by_the_next(end: str, after: bool) -> None:
    """Restart injected at every API call of a pass, on either side of its effect."""
    for call in range(200):
        world = World()
        world.server.put(INFERENCE_SERVICE, service_object())
        if end != "create":
            await world.settle()
        if end == "change":
            world.server.put(INFERENCE_SERVICE, service_object(colocated={"replicas": 1}, router={"replicas": 2}))
        if end == "delete":
            world.server.delete(INFERENCE_SERVICE.path("ns", "chat"))
        start = len(world.server.calls)

        def die(verb: str, path: str, world: World = world, at: int = start + call) -> None:
            if len(world.server.calls) >= at + after:
                raise Crash

        if after:
            world.server.after = die
        else:
            world.server.before = die
        try:
            await world.operator().reconcile("ns", "chat")
            finished = True
        except Crash:
            finished = False
        world.server.before = world.server.after = lambda verb, path: None
        await world.settle()
        clean = World()
        if end != "delete":
            spec: Tree = {} if end == "create" else {"colocated": {"replicas": 1}, "router": {"replicas": 2}}
            clean.server.put(INFERENCE_SERVICE, service_object(**spec))
            await clean.settle()
        assert wanted(world.server.children()) == wanted(clean.server.children()), call
        if finished:
            assert call > 10 or end == "delete"
            return
    raise AssertionError("a pass of 200 calls")


SPECS = st.fixed_dictionaries(
    {},
    optional={
        "prefill": st.fixed_dictionaries({"replicas": st.integers(1, 3)}),
        "decode": st.sampled_from([{"replicas": 2}, {"minReplicas": 1, "maxReplicas": 3}]),
        "router": st.fixed_dictionaries({"replicas": st.integers(1, 2)}),
        "slo": st.just({"itlMs": 20}),
    },
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("edit"), SPECS),
        st.tuples(st.just("crash"), st.integers(0, 60)),
        st.tuples(st.just("fail"), st.integers(0, 60)),
        st.tuples(st.just("lose"), st.integers(0, 17)),
        st.tuples(st.just("pods"), st.booleans()),
        st.tuples(st.just("pass"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_history_of_edits_losses_and_failures_ends_in_the_newest_spec(steps: list[tuple[str, Any]]) -> None:
    asyncio.run(_live_through(steps))


async def _live_through(steps: list[tuple[str, Any]]) -> None:
    world, spec = World(), {}
    world.server.put(INFERENCE_SERVICE, service_object())
    operator = world.operator()
    for step, value in steps:
        if step == "edit":
            spec = value
            world.server.put(INFERENCE_SERVICE, service_object(**spec))
        elif step == "pods":
            world.make_pods(ready=value)
        elif step == "lose" and (children := sorted(world.server.children())):
            world.server.delete(children[value % len(children)])
        elif step in ("crash", "fail", "pass"):
            at = len(world.server.calls) + (value if value is not None else 10_000)

            def die(verb: str, path: str, at: int = at, step: str = step) -> None:
                if len(world.server.calls) >= at:
                    raise Crash if step == "crash" else KubeError("broken", status=500)

            world.server.before = die
            try:
                await operator.reconcile("ns", "chat")
            except Crash:
                operator = world.operator()
            except KubeError:
                pass
            world.server.before = lambda verb, path: None
    await world.settle(operator=operator)
    clean = World()
    clean.server.put(INFERENCE_SERVICE, service_object(**spec))
    await clean.settle()
    ours, fresh = wanted(world.server.children()), wanted(clean.server.children())
    for children in (ours, fresh):  # an autoscaled number depends on history; it has only to be within its bounds
        for item in children.values():
            if item["kind"] == "Deployment":
                assert 1 <= item["spec"].pop("replicas", 1) <= 3
    assert ours == fresh
