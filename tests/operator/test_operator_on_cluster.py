"""The operator as a process beside a real API server with the real controllers: what it makes, repairs, rolls, removes.

Nothing is scheduled here (no nodes), so services stay not Ready; that they come to serve is shown end to end elsewhere.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.cluster import Cluster, ClusterFailed, control_plane, why_no_control_plane
from support.operator_process import Operator, until

from baton_operator import shipped
from baton_operator.api import AcceleratorProfile, InferenceService
from baton_operator.crd import FOLDER
from baton_operator.leader import LeaseTimes
from baton_operator.plan.children import desired
from baton_operator.plan.intake import Platform, blueprint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SERVICE = """\
apiVersion: serving.baton.dev/v1alpha1
kind: InferenceService
metadata:
  name: {name}
spec:
  model:
    uri: baton://demo
  profile: {profile}
  prefill: {{replicas: {prefill}}}
"""
ISVC = "/apis/serving.baton.dev/v1alpha1/namespaces/{ns}/inferenceservices"
KINDS = "deploy,svc,cm,sa,role,rolebinding,netpol,pdb"
LABEL = "serving.baton.dev/service={name}"
PLATFORM = Platform(router_image="local/router:1", worker_image="local/worker:1-{flavour}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_no_control_plane():
        pytest.skip(reason)
    with control_plane(tmp_path_factory.mktemp("operator-cluster"), controllers=True) as found:
        found.apply(*sorted(FOLDER.glob("*.yaml")))
        found.apply(shipped.FOLDER / "cpu.yaml")
        yield found


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "t-" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "isvc", "--all", "-n", name, "--wait=false")


@contextmanager
def operators(cluster: Cluster, folder: Path, count: int = 1, port: int = 19300) -> Iterator[list[Operator]]:
    made: list[Operator] = []
    try:
        images = (PLATFORM.router_image, PLATFORM.worker_image)
        made.extend(
            Operator(
                cluster.kubeconfig, folder / f"operator-{index}.log", port + 10 * index, images=images,
                options=["--resync-s", "2"],
            )
            for index in range(count)
        )  # fmt: skip
        yield made
    finally:
        for one in made:
            one.kill()
        cluster.kubectl("delete", "lease", "baton-operator", "--ignore-not-found", "-n", "default")


def apply(cluster: Cluster, ns: str, name: str = "demo", *, profile: str = "cpu", prefill: int = 1) -> None:
    cluster.kubectl("apply", "-n", ns, "-f", "-", stdin=SERVICE.format(name=name, profile=profile, prefill=prefill))


def children(cluster: Cluster, ns: str, name: str = "demo") -> dict[tuple[str, str], Any]:
    found = json.loads(cluster.kubectl(
        "get", KINDS, "-n", ns, "-l", LABEL.format(name=name), "-o", "json", "--show-managed-fields"
    ))
    return {(item["kind"], item["metadata"]["name"]): item for item in found["items"]}


def planned(cluster: Cluster, ns: str, name: str = "demo") -> set[tuple[str, str]]:
    live = cluster.request("GET", f"{ISVC.format(ns=ns)}/{name}").body
    profile = AcceleratorProfile.parse(yaml.safe_load((shipped.FOLDER / "cpu.yaml").read_text()))
    plan = blueprint(InferenceService.parse({**live, "status": None}), profile, PLATFORM)
    return {(item.kind.kind, item.name) for item in desired(plan, served=[]).children}


def complete(cluster: Cluster, ns: str, name: str = "demo") -> bool:
    return set(children(cluster, ns, name)) == planned(cluster, ns, name)


def replicas(cluster: Cluster, ns: str) -> int:
    return int(children(cluster, ns)["Deployment", "demo-prefill"]["spec"]["replicas"])


def condition(cluster: Cluster, ns: str, kind: str, name: str = "demo") -> dict[str, Any]:
    status = cluster.request("GET", f"{ISVC.format(ns=ns)}/{name}").body.get("status", {})
    return next((item for item in status.get("conditions", []) if item["type"] == kind), {})


def test_ten_lines_become_all_planned_objects_and_then_nothing_is_written(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operators(cluster, tmp_path) as [operator]:
        until(operator.leads, "a leader")
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        uid = cluster.request("GET", f"{ISVC.format(ns=namespace)}/demo").body["metadata"]["uid"]
        for item in children(cluster, namespace).values():
            assert [owner["uid"] for owner in item["metadata"]["ownerReferences"]] == [uid]
            assert {entry["manager"] for entry in item["metadata"]["managedFields"]} <= {
                "baton-operator", "kube-controller-manager",
            }  # fmt: skip
        until(lambda: condition(cluster, namespace, "Accepted").get("status") == "True", "Accepted")
        time.sleep(3)  # pods have come; the status has taken them in
        writes = operator.metric("baton_operator_writes_total")
        passes = operator.metric("baton_operator_reconciles_total")
        assert writes > 18
        until(lambda: operator.metric("baton_operator_reconciles_total") >= passes + 5, "five more passes")
        assert operator.metric("baton_operator_writes_total") == writes
        metadata = cluster.request("GET", f"{ISVC.format(ns=namespace)}/demo").body["metadata"]
        annotations = metadata.get("annotations", {})
        assert not [key for key in annotations if "kopf" in key or "last-handled" in key]
        assert psutil.Process(operator.process.pid).memory_info().rss < 120 << 20
        assert operator.get("/readyz", operator.health_port) == operator.get("/healthz", operator.health_port) == "ok\n"
        assert operator.stop() == 0


def test_what_others_change_delete_or_add_is_put_right(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with operators(cluster, tmp_path):
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        edit = json.dumps([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "evil:1"}])
        cluster.kubectl("patch", "deploy", "demo-decode", "-n", namespace, "--type=json", "-p", edit)
        rule = json.dumps([{"op": "add", "path": "/rules/-", "value": {
            "apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}}])  # fmt: skip
        cluster.kubectl("patch", "role", "demo-router", "-n", namespace, "--type=json", "-p", rule)
        cluster.kubectl("delete", "netpol", "demo-deny", "-n", namespace)

        def right() -> bool:
            found = children(cluster, namespace)
            if ("NetworkPolicy", "demo-deny") not in found:
                return False
            image = found["Deployment", "demo-decode"]["spec"]["template"]["spec"]["containers"][0]["image"]
            return image == "local/worker:1-cpu" and "secrets" not in str(found["Role", "demo-router"]["rules"])

        until(right, "everything as planned again")


def test_another_manager_gets_a_conflict_and_what_it_forces_is_taken_back_once(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operators(cluster, tmp_path) as [operator]:
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        theirs = json.dumps({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "demo-decode"},
            "spec": {"minReadySeconds": 5, "revisionHistoryLimit": 9},  # the one is nobody's, the other is ours
        })  # fmt: skip
        as_other = ("apply", "--server-side", "--field-manager=other", "-n", namespace, "-f", "-")
        with pytest.raises(ClusterFailed, match=r"conflict with \"baton-operator\": .spec.revisionHistoryLimit"):
            cluster.kubectl(*as_other, stdin=theirs)
        cluster.kubectl(*as_other, "--force-conflicts", stdin=theirs)

        def decode() -> Any:
            return children(cluster, namespace)["Deployment", "demo-decode"]["spec"]

        until(lambda: decode()["revisionHistoryLimit"] == 3, "taken back")
        passes, settled = operator.metric("baton_operator_reconciles_total"), decode()
        until(lambda: operator.metric("baton_operator_reconciles_total") > passes + 3, "passes")
        assert decode() == settled
        assert decode()["minReadySeconds"] == 5


def test_a_changed_spec_changes_the_children_and_what_is_not_wanted_goes(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operators(cluster, tmp_path):
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        first = cluster.request("GET", f"{ISVC.format(ns=namespace)}/demo").body["status"]["updatedRevision"]
        apply(cluster, namespace, prefill=3)
        until(lambda: replicas(cluster, namespace) == 3, "3 replicas")
        colocated = json.dumps({"spec": {"prefill": None, "colocated": {"replicas": 1}}})
        cluster.kubectl("patch", "isvc", "demo", "-n", namespace, "--type=merge", "-p", colocated)
        until(lambda: complete(cluster, namespace), "exactly the new children")
        assert ("Deployment", "demo-prefill") not in children(cluster, namespace)
        until(lambda: cluster.request("GET", f"{ISVC.format(ns=namespace)}/demo").body["status"]["updatedRevision"]
              != first, "a new revision")  # fmt: skip


def test_replicas_are_handed_to_an_autoscaler_without_a_dip(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with operators(cluster, tmp_path) as [operator]:
        apply(cluster, namespace, prefill=3)
        until(lambda: complete(cluster, namespace), "all children")
        role = "serving.baton.dev/role=prefill"
        pods = ("get", "pods", "-n", namespace, "-l", role, "-o", "jsonpath={.items[*].metadata.uid}")
        until(lambda: len(cluster.kubectl(*pods).split()) == 3, "three pods")
        before = set(cluster.kubectl(*pods).split())
        bounds = json.dumps({"spec": {"prefill": {"replicas": None, "minReplicas": 2, "maxReplicas": 6}}})
        cluster.kubectl("patch", "isvc", "demo", "-n", namespace, "--type=merge", "-p", bounds)
        passes = operator.metric("baton_operator_reconciles_total")
        until(lambda: operator.metric("baton_operator_reconciles_total") > passes + 2, "passes")
        deployment = children(cluster, namespace)["Deployment", "demo-prefill"]
        assert deployment["spec"]["replicas"] == 3
        assert set(cluster.kubectl(*pods).split()) == before  # no pod went in between
        cluster.kubectl("scale", "deploy", "demo-prefill", "-n", namespace, "--replicas=5")
        passes = operator.metric("baton_operator_reconciles_total")
        until(lambda: operator.metric("baton_operator_reconciles_total") > passes + 10, "ten passes", 180)
        assert replicas(cluster, namespace) == 5
        cluster.kubectl("scale", "deploy", "demo-prefill", "-n", namespace, "--replicas=9")
        until(lambda: replicas(cluster, namespace) == 6, "the bound")


def test_a_deleted_service_leaves_nothing(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with operators(cluster, tmp_path):
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        cluster.kubectl("delete", "isvc", "demo", "-n", namespace, "--timeout=20s")
        until(lambda: not children(cluster, namespace), "no child")
        pods = ("get", "pod,rs", "-n", namespace, "-o", "name")
        until(lambda: not cluster.kubectl(*pods).strip(), "no pod")


def test_an_unknown_profile_is_told_and_heals_by_itself(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operators(cluster, tmp_path) as [operator]:
        until(operator.leads, "a leader")
        apply(cluster, namespace, profile="absent")
        found = until(lambda: condition(cluster, namespace, "Accepted").get("reason") == "ProfileNotFound", "a reason")
        print(f"told after {found:.1f} s")
        assert "cpu" in condition(cluster, namespace, "Accepted")["message"]
        assert condition(cluster, namespace, "Ready")["status"] == "False"
        events = ("get", "events", "-n", namespace, "-o", "jsonpath={.items[*].reason}")
        until(lambda: "ProfileNotFound" in cluster.kubectl(*events), "an event")
        profile = yaml.safe_load((shipped.FOLDER / "cpu.yaml").read_text())
        profile["metadata"]["name"] = "absent"
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(profile))
        until(lambda: condition(cluster, namespace, "Accepted").get("status") == "True", "healed")
        cluster.kubectl("delete", "acceleratorprofile", "absent")


def test_an_operator_killed_again_and_again_converges(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    dice = random.Random(7)
    apply(cluster, namespace)
    cluster.kubectl("delete", "lease", "baton-operator", "--ignore-not-found", "-n", "default")
    for index in range(6):
        with operators(cluster, tmp_path) as [operator]:
            until(operator.leads, "a leader")
            apply(cluster, namespace, prefill=1 + index % 3)
            time.sleep(dice.uniform(0.0, 0.25))
            operator.kill()
    with operators(cluster, tmp_path):
        until(lambda: complete(cluster, namespace), "all children")
        until(lambda: replicas(cluster, namespace) == 3, "the newest spec")


def test_when_the_leader_dies_the_other_replica_takes_over(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operators(cluster, tmp_path, count=2) as pair:
        until(lambda: any(one.leads() for one in pair), "a leader")
        time.sleep(3)
        [leader] = [one for one in pair if one.leads()]
        [other] = [one for one in pair if one is not leader]
        apply(cluster, namespace)
        until(lambda: complete(cluster, namespace), "all children")
        assert other.metric("baton_operator_writes_total") == 0
        leader.kill()
        apply(cluster, namespace, prefill=2)
        took_s = until(lambda: replicas(cluster, namespace) == 2, "the other acts")
        print(f"the other acted {took_s:.1f} s after the leader was killed")
        assert other.leads()


def test_an_orderly_stop_hands_over_at_once(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with operators(cluster, tmp_path, count=2) as pair:
        until(lambda: any(one.leads() for one in pair), "a leader")
        time.sleep(3)
        [leader] = [one for one in pair if one.leads()]
        [other] = [one for one in pair if one is not leader]
        assert leader.stop() == 0
        # well before the lease would have run out
        assert until(other.leads, "the other leads") < LeaseTimes().lease_s - 2
