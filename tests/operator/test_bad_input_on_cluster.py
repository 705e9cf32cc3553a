"""Bad input on a real cluster with real pods: one table of mistakes, what a user reads, and how each is mended.

Every row: the condition with its reason and remedy appears, an event says so too, and mending the input heals it with
no further action. Pods that a row has no use for are parked on a node that does not exist. Models are hardly served
here: that is the e2e.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import cluster
from support.chart import tool
from support.operator_process import Operator, until

from baton_operator import shipped
from baton_operator.crd import FOLDER
from baton_operator.kinds import HTTP_ROUTE, INFERENCE_SERVICE
from baton_operator.trouble import pod_trouble

REASON = cluster.why_no_node()
pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(REASON), reason=REASON),
]  # fmt: skip

Tree = dict[str, Any]
INDEX = 6  # other cluster tests may run beside these
STATE = Path.home() / ".cache/baton/bad-input-cluster"
IMAGES = Path.home() / ".cache/baton/images"
NAMESPACE = "team-a"
PORT = 19500
LONG_S = 240.0  # a bound for a slow machine; how long it took is printed
PARKED: Tree = {"podTemplate": {"spec": {"nodeSelector": {"nowhere": "true"}}}}
LITTLE: Tree = {"requests": {"cpu": "20m", "memory": "64Mi"}}
TINY, NOWHERE = "tiny", "nowhere"  # profiles


class World:
    """The cluster, the operator beside it, and what users do."""

    def __init__(self, running: cluster.Cluster) -> None:
        self.cluster = running
        self.lags_s: dict[str, tuple[float, float]] = {}

    def put(self, *objects: Tree) -> None:
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(whole))

    def service(self, name: str, spec: Tree) -> None:
        """Declares it, or edits it: what the old one had and this one has not is gone."""
        metadata = {"name": name, "namespace": NAMESPACE}
        self.put({
            "apiVersion": INFERENCE_SERVICE.api_version, "kind": INFERENCE_SERVICE.kind, "metadata": metadata,
            "spec": spec,
        })  # fmt: skip

    def condition(self, name: str, kind: str) -> Tree:
        live = self.cluster.request("GET", INFERENCE_SERVICE.path(NAMESPACE, name)).body
        conditions = live.get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == kind), {"status": "", "reason": "", "message": ""})

    def trouble(self, name: str) -> bool:
        """Does the cluster itself show that something is wrong with a pod of the service?"""
        query = f"?labelSelector=serving.baton.dev/service={name}"
        pods = self.cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods{query}").body["items"]
        parked = ({"nowhere": "true"},)
        return any(pod_trouble(pod) for pod in pods if pod["spec"].get("nodeSelector") not in parked)

    def events(self, name: str) -> set[str]:
        found = json.loads(self.cluster.kubectl("get", "events", "-n", NAMESPACE, "-o", "json"))["items"]
        return {event["reason"] for event in found if event["involvedObject"]["name"] == name}

    def report(self, name: str) -> str:
        pods = self.cluster.kubectl("get", "pods", "-n", NAMESPACE, "-o", "wide", check=False)
        return pods + self.cluster.kubectl("get", "isvc", name, "-n", NAMESPACE, "-o", "yaml", check=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    kit = cluster.kit()
    if kit is None:
        pytest.skip("the images of these pods are made for the test cluster kit")
    made = tool("make_images").make(kit, IMAGES, ["router", "worker"])
    mounts = [part for mount in made["mounts"] for part in ("--mount", mount)]
    log = tmp_path_factory.mktemp("bad-input") / "operator.log"
    with cluster.node(STATE, index=INDEX, options=mounts) as running:
        cluster.load_images(STATE, *map(Path, made["archives"]))
        running.apply(*sorted(FOLDER.glob("*.yaml")))
        found = World(running)
        label = {"pod-security.kubernetes.io/enforce": "restricted"}
        found.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": label}})
        found.put(
            yaml.safe_load((shipped.FOLDER / "h200.yaml").read_text()), profile(TINY), profile(NOWHERE, nowhere="true")
        )
        images = (f"baton/router:{made['tag']}", f"baton/worker:{made['tag']}-{{flavour}}")
        operator = Operator(running.kubeconfig, log, PORT, images=images)
        try:
            until(operator.leads, "a leader", LONG_S)
            yield found
        finally:
            operator.kill()
            for name, (asked_s, shown_s) in found.lags_s.items():
                print(f"{name:22} {asked_s:5.1f} s after it was declared, {shown_s:5.1f} s after the cluster showed it")


def profile(name: str, **labels: str) -> Tree:
    """The shipped CPU profile, for a node that has little to give."""
    made: Tree = yaml.safe_load((shipped.FOLDER / "cpu.yaml").read_text())
    made["metadata"]["name"] = name
    made["spec"] |= {"workerResources": LITTLE, "nodeSelector": labels}
    return made


def secret(name: str) -> Tree:
    data = {"one": "a-key-of-a-tenant"}
    return {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "stringData": data,
    }  # fmt: skip


def claim(name: str) -> Tree:
    spec = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def route_kind() -> Tree:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    names = {"plural": HTTP_ROUTE.plural, "kind": HTTP_ROUTE.kind, "singular": "httproute", "listKind": "HTTPRouteList"}
    notes = {"api-approved.kubernetes.io": "unapproved, a test"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{HTTP_ROUTE.plural}.{HTTP_ROUTE.group}", "annotations": notes},
        "spec": {
            "group": HTTP_ROUTE.group, "scope": "Namespaced", "names": names,
            "versions": [{"name": HTTP_ROUTE.version, "served": True, "storage": True, "schema": schema}],
        },
    }  # fmt: skip


def spec(**changes: Any) -> Tree:
    """A service whose pods are all parked."""
    base: Tree = {
        "model": {"uri": "baton://demo"}, "profile": TINY, "prefill": PARKED, "decode": PARKED,
        "router": {**PARKED, "resources": LITTLE},
    }  # fmt: skip
    made = copy.deepcopy(base)
    for part, change in changes.items():
        made[part] = {**made.get(part, {}), **change} if part == "router" else change
    return made


def container(name: str = "main", **changes: Any) -> Tree:
    return {"podTemplate": {"spec": {"containers": [{"name": name, **changes}]}}}


NO_IMAGE: Tree = {
    "podTemplate": {"spec": {
        "containers": [{"name": "main", "image": "nobody/nothing:1"}],
        "initContainers": [{"name": "fetch-model", "image": "nobody/nothing:1"}],
    }}
}  # fmt: skip
WRONG = container(env=[{"name": "BATON_ROUTER_LOG_LEVEL", "value": "loud"}])
OTHER_DTYPE = [{"name": "BATON_ENGINE_DTYPE", "value": "float32"}]
FREE: Tree = {"podTemplate": {"spec": {}}}


@dataclass(frozen=True)
class Mistake:
    """`mended`: the spec afterwards, or what is made in the cluster instead."""

    name: str
    spec: Tree
    kind: str
    reason: str
    words: tuple[str, ...]
    mended: Tree | None = None
    made: tuple[Tree, ...] = ()
    healed: Callable[[Tree], bool] = field(default=lambda found: found["status"] == "True")


def pods_come(found: Tree) -> bool:
    return found["status"] == "True" or found["reason"] in (
        "PodsStarting", "WaitingForWorkers", "NotRegistered", "RegistrationFailed", "TransportNotProved",
    )  # fmt: skip


def looks_on(found: Tree) -> bool:
    """Of a model: somebody may look for it now."""
    return found["reason"] in ("NoPods", "Waiting", "Fetching", "Loading", "Loaded")


MISTAKES = [
    Mistake("unknown-profile", spec(profile="absent"), "Accepted", "ProfileNotFound",
            ("no AcceleratorProfile absent", "create it", "tiny"), made=(profile("absent", nowhere="true"),)),
    Mistake("tensor", spec(profile="h200", parallelism={"tensor": 8}), "Accepted", "NotSupported",
            ("set parallelism.tensor to 1",), mended=spec(profile="h200")),
    Mistake("dtype", spec(model={"uri": "baton://demo", "dtype": "bfloat16"}, decode=container(env=OTHER_DTYPE),
                          profile=NOWHERE), "Accepted", "KvMismatch",
            ("prefill says bfloat16 and decode says float32", "spec.model"),
            mended=spec(model={"uri": "baton://demo", "dtype": "bfloat16"})),
    Mistake("unknown-keys", spec(router={"apiKeysSecret": "keys"}), "RouterReady", "SecretNotFound",
            ("no Secret keys", "create it, or change spec.router.apiKeysSecret"), made=(secret("keys"),),
            healed=lambda found: found["reason"] in ("PodsStarting", "Unschedulable")),
    Mistake("unknown-token", spec(model={"uri": "hf://a/b", "credentialsSecret": "token"}), "ModelReady",
            "SecretNotFound", ("no Secret token", "spec.model.credentialsSecret"), made=(secret("token"),),
            healed=looks_on),
    Mistake("unknown-claim", spec(model={"uri": "pvc://weights/llama"}), "ModelReady", "ClaimNotFound",
            ("no PersistentVolumeClaim weights", "create it, or change spec.model.uri"), made=(claim("weights"),),
            healed=looks_on),
    Mistake("no-gateway-api", spec(router={"httpRoute": {"gateway": "front"}}), "RouterReady", "KindNotServed",
            ("no HTTPRoute", "install the Gateway API's CRDs"), made=(route_kind(),),
            healed=lambda found: found["reason"] in ("PodsStarting", "Unschedulable")),
    Mistake("no-gpu-node", spec(profile="h200"), "PrefillReady", "Unschedulable", ("no node takes pod", "add nodes"),
            mended=spec(prefill=FREE), healed=pods_come),
    Mistake("too-much-cpu", spec(decode={"resources": {"requests": {"cpu": 64}}}), "DecodeReady", "Unschedulable",
            ("Insufficient cpu", "lower the replicas or their resources"), mended=spec(decode=FREE), healed=pods_come),
    Mistake("no-image", spec(router=NO_IMAGE), "RouterReady", "ImageUnavailable",
            ("nobody/nothing:1", "pull secrets"), mended=spec(router=FREE), healed=pods_come),
    Mistake("crash-loop", spec(router=WRONG), "RouterReady", "Crashing",
            ("ended with status 2", "log_level", "kubectl logs"), mended=spec(router=FREE),
            healed=lambda found: found["reason"] == "WaitingForWorkers"),
    Mistake("ends-by-itself", spec(decode=container(command=["true"])), "DecodeReady", "Crashing",
            ("ended with status 0", "it should run on"), mended=spec(decode=FREE), healed=pods_come),
    Mistake("no-model", spec(model={"uri": "hf://nobody/nothing"}, decode=FREE), "ModelReady", "FetchFailed",
            ("the model cannot be fetched", "check spec.model.uri"), mended=spec(decode=FREE)),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_with_its_remedy_and_heals_when_it_is_mended(world: World, mistake: Mistake) -> None:
    name, began_s, shown_s = mistake.name, time.monotonic(), 0.0
    world.service(name, mistake.spec)
    while world.condition(name, mistake.kind)["reason"] != mistake.reason:
        shown_s = shown_s or (time.monotonic() if world.trouble(name) else 0.0)
        assert time.monotonic() - began_s < LONG_S, world.report(name)
        time.sleep(0.1)
    now_s = time.monotonic()
    world.lags_s[name] = (now_s - began_s, now_s - (shown_s or began_s))
    found = world.condition(name, mistake.kind)
    for word in mistake.words:
        assert word in found["message"], found
    until(lambda: world.condition(name, "Ready")["status"] == "False", "not Ready", LONG_S)
    until(lambda: mistake.reason in world.events(name), f"an event {mistake.reason}", LONG_S)
    if mistake.mended is not None:
        world.service(name, mistake.mended)
    if mistake.made:
        world.put(*mistake.made)
    try:
        until(lambda: mistake.healed(world.condition(name, mistake.kind)), "healed", LONG_S)
    except AssertionError:
        pytest.fail(world.report(name))
    world.cluster.kubectl("delete", "isvc", name, "-n", NAMESPACE, "--wait=false")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (spec(profile="h200", parallelism={"tensor": 3}), "use 1, 2, 4, 8, 16, 32 or 64"),
        (spec(profile="cpu", parallelism={"tensor": 2}), "choose a GPU profile or set parallelism.tensor to 1"),
        (spec(decode={"kvDtype": "float32"}), 'unknown field "kvDtype"'),
        (spec(transport={"wire": "shm"}), "use auto or tcp"),
    ],
    ids=["tensor", "tensor on cpus", "kv dtype of a role", "shared memory"],
)
def test_what_can_never_work_is_refused_by_the_api_server_itself(world: World, wrong: Tree, words: str) -> None:
    with pytest.raises(cluster.ClusterFailed, match=words):
        world.service("refused", wrong)


def test_pods_of_deleted_services_leave_at_once_also_those_that_were_just_starting(world: World) -> None:
    """Without waiting for the end of their grace period, which is minutes."""
    world.cluster.kubectl("delete", "isvc", "--all", "-n", NAMESPACE, "--wait=false")
    pods = ("get", "pods", "-n", NAMESPACE, "-o", "name")
    until(lambda: not world.cluster.kubectl(*pods).strip(), "no pod", LONG_S)
