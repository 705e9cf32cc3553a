"""Rights granted and rights used: the chart's own roles, a real API server, and its audit log as the recorder.

Two operators live a whole life as the chart's ServiceAccount. Every call counts, also those of kopf: the log is the API
server's. What is granted and never used must stand in the table below with its reason.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import chart
from support.cluster import KUBECONFIG_VARIABLE, Cluster, control_plane, why_no_control_plane
from support.operator_process import Operator, until

from baton_common.kube.credentials import find_credentials
from baton_common.kube.kinds import Kind
from baton_operator import shipped, watching
from baton_operator.config import OperatorConfig
from baton_operator.crd import FOLDER
from baton_operator.kinds import CHILD_KINDS, INFERENCE_SERVICE, OPTIONAL_KINDS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Right = tuple[str, str, str]  # group, resource or resource/subresource, verb
EXCEPTIONS: Mapping[Right, str] = {
    **{(kind.group, kind.plural, "create"): "server-side apply is a PATCH; for a new object the API server asks for "
       "create as well, and logs only the patch" for kind in CHILD_KINDS},
    ("", "pods", "get"): "granted on to routers",
    ("", "pods/status", "patch"): "granted on to routers",
    ("discovery.k8s.io", "endpointslices", "get"): "granted on to routers",
    ("discovery.k8s.io", "endpointslices", "watch"): "granted on to routers",
    ("serving.baton.dev", "inferenceservices/finalizers", "update"): "asked for by the admission plug-in "
    "OwnerReferencesPermissionEnforcement where it is on, because children block the deletion of their owner",
}  # fmt: skip
PREPARED = (
    "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Secret",
    "ValidatingWebhookConfiguration",
)  # fmt: skip
POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: ["system:serviceaccounts:{namespace}"]
- level: None
"""
SPEC = {
    "model": {"uri": "hf://Qwen/Qwen3-0.6B", "credentialsSecret": "token", "cacheClaim": "cache"},
    "profile": "cpu",
    "prefill": {"minReplicas": 1, "maxReplicas": 2},
    "decode": {"replicas": 1},
    "router": {
        "apiKeysSecret": "keys",
        "ingress": {"host": "chat.example.com", "tlsSecret": "cert"},
    },
}
ROUTED = {**SPEC, "router": {"httpRoute": {"gateway": "front"}}}
LEAN = {"model": {"uri": "hf://Qwen/Qwen3-0.6B"}, "profile": "cpu", "colocated": {"replicas": 1}}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    if reason := why_no_control_plane():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("rights")
    (folder / "policy.yaml").write_text(POLICY.format(namespace=chart.NAMESPACE))
    flags = (f"--audit-policy-file={folder / 'policy.yaml'}", f"--audit-log-path={folder / 'audit.log'}")
    with control_plane(folder, controllers=True, flags=flags) as cluster:
        if cluster.kubeconfig.parent != folder:
            pytest.skip(f"{KUBECONFIG_VARIABLE} names a cluster whose audit log is out of reach")
        yield House(cluster, folder)


class House:
    """The cluster with the chart's roles, and what was asked of it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        cluster.apply(*sorted(FOLDER.glob("*.yaml")))
        cluster.apply(shipped.FOLDER / "cpu.yaml")
        for name in (chart.NAMESPACE, "team-a"):
            cluster.kubectl("create", "namespace", name)
        rendered = chart.render({})
        self.objects = [item for item in rendered if item["kind"] in PREPARED]
        for item in chart.of_kind(self.objects, "ValidatingWebhookConfiguration"):
            for hook in item["webhooks"]:  # the operators are outside: the API server would wait for them in vain
                hook["namespaceSelector"] = {"matchLabels": {"nowhere": "true"}}
        self.put(*self.objects)
        self.account = chart.one(self.objects, "ServiceAccount")["metadata"]["name"]
        settings = folder / "settings.yaml"
        settings.write_text(chart.one(rendered, "ConfigMap")["data"]["settings.yaml"])
        self.options = ["--config", str(settings), "--lease-namespace", chart.NAMESPACE, "--resync-s", "2"]

    def put(self, *objects: Mapping[str, Any]) -> None:
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(whole))

    def kubeconfig(self, name: str) -> Path:
        """Of the chart's account, with a token as in a pod."""
        config = self.folder / f"{name}.kubeconfig"
        admin = json.loads(self.cluster.kubectl("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
        token = self.cluster.kubectl("create", "token", self.account, "-n", chart.NAMESPACE).strip()
        admin["users"][0]["user"] = {"token": token}
        config.write_text(json.dumps(admin))
        return config

    def operator(self, name: str, port: int) -> Operator:
        images, log = ("local/router:1", "local/worker:1-{flavour}"), self.folder / f"{name}.log"
        options = [*self.options, "--webhook-port", str(port + 2)]
        return Operator(self.kubeconfig(name), log, port, images=images, options=options)

    def names(self, *arguments: str) -> set[str]:
        return set(self.cluster.kubectl("get", *arguments, "-n", "team-a", "-o", "name").split())

    def calls(self) -> list[dict[str, Any]]:
        lines = (self.folder / "audit.log").read_text().splitlines()
        return [call for call in map(json.loads, lines) if "objectRef" in call and "resource" in call["objectRef"]]

    def used(self) -> set[Right]:
        found = set()
        for call in self.calls():
            what = call["objectRef"]
            resource = "/".join(part for part in (what["resource"], what.get("subresource", "")) if part)
            found.add((what.get("apiGroup", ""), resource, call["verb"]))
        return found

    def granted(self) -> set[Right]:
        roles = [item for item in self.objects if item["kind"] in ("ClusterRole", "Role")]
        return {
            (group, resource, verb)
            for role in roles for rule in role["rules"]
            for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
        }  # fmt: skip


def crd(kind: Kind) -> dict[str, Any]:
    """A kind by its name only."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    names = {"plural": kind.plural, "kind": kind.kind, "singular": kind.kind.lower(), "listKind": f"{kind.kind}List"}
    notes = {"api-approved.kubernetes.io": "unapproved, a test"} if kind.group.endswith(".k8s.io") else {}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{kind.group}", "annotations": notes},
        "spec": {
            "group": kind.group, "scope": "Namespaced", "names": names,
            "versions": [{"name": kind.version, "served": True, "storage": True, "schema": schema}],
        },
    }  # fmt: skip


def test_every_right_is_used_in_a_whole_life_and_nothing_more_is_asked_for(house: House) -> None:
    pair = [house.operator("first", 19400), house.operator("second", 19410)]
    try:
        live_through(house, pair)
    finally:
        for one in pair:
            one.kill()
    forbidden = [
        (call["verb"], call["requestURI"]) for call in house.calls()
        if call.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid"
    ]  # fmt: skip
    assert forbidden == []
    used, granted = house.used(), house.granted()
    assert used - granted == set()
    assert granted - used - EXCEPTIONS.keys() == set(), "granted and never used: trim it, or explain it"
    assert EXCEPTIONS.keys() <= granted - used, "explained away, and yet used or not even granted"
    print(f"{len(granted)} rights granted, {len(used)} used, {len(EXCEPTIONS)} explained")


def service(spec: Mapping[str, Any]) -> str:
    return json.dumps({
        "apiVersion": INFERENCE_SERVICE.api_version, "kind": INFERENCE_SERVICE.kind,
        "metadata": {"name": "demo", "namespace": "team-a"}, "spec": spec,
    })  # fmt: skip


def live_through(house: House, pair: list[Operator]) -> None:
    """Install, a service with every option, scale, edits, a change of the leader, delete."""
    until(lambda: any(one.leads() for one in pair), "a leader", 180)
    house.cluster.kubectl("create", "-f", "-", stdin=service(SPEC))
    until(lambda: "deployment.apps/demo-decode" in house.names("deploy"), "Deployments")
    house.put(*map(crd, OPTIONAL_KINDS))  # installed later than the operator and the service
    optional = "ingress,servicemonitors,podmonitors,httproutes"
    until(lambda: len(house.names(optional)) == 3, "objects of optional kinds", 180)
    house.cluster.kubectl("scale", "deploy/demo-prefill", "-n", "team-a", "--replicas=5")
    asked = ("get", "deploy/demo-prefill", "-n", "team-a", "-o", "jsonpath={.spec.replicas}")
    until(lambda: house.cluster.kubectl(*asked) == "2", "the bound of the autoscaler")
    [leader] = [one for one in pair if one.leads()]
    [other] = [one for one in pair if one is not leader]
    assert leader.stop() == 0
    until(other.leads, "the other leads", 180)
    house.cluster.kubectl("replace", "-f", "-", stdin=service(ROUTED))
    until(lambda: {name.partition(".")[0] for name in house.names("ingress,httproutes")} == {"httproute"},
          "a route in place of the ingress", 60)  # fmt: skip
    house.cluster.kubectl("replace", "-f", "-", stdin=service(LEAN))
    until(lambda: not house.names("httproutes"), "what is no longer wanted is gone", 180)
    house.cluster.kubectl("delete", "isvc", "demo", "-n", "team-a", "--timeout=60s")
    until(lambda: not house.names("deploy,svc,cm,role,rolebinding,netpol,pdb", "-l", "serving.baton.dev/service"),
          "nothing is left", 60)  # fmt: skip
    assert other.stop() == 0


class Listener:
    """In place of the controller: hears and does nothing."""

    def service_changed(self, namespace: str, name: str, profile: str) -> None: ...

    def service_gone(self, namespace: str, name: str) -> None: ...

    def child_changed(self, namespace: str, service: str) -> None: ...

    def profile_changed(self, profile: str) -> None: ...


async def test_a_watch_that_is_refused_for_good_ends_all_watching_instead_of_staying_deaf(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the end of watching ends the process with status 1 (`main`): the kubelet's restart is seen."""
    monkeypatch.setattr(watching, "_BACK_OFF_S", (0.1, 0.2))
    role = chart.one(house.objects, "ClusterRole")
    less = [rule for rule in role["rules"] if "networkpolicies" not in rule["resources"]]
    change = ("patch", "clusterrole", role["metadata"]["name"], "--type=merge", "-p")
    house.cluster.kubectl(*change, json.dumps({"rules": less}))
    credentials = find_credentials(str(house.kubeconfig("deaf")), {})
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # kopf leaves failed tasks behind
    listener: Any = Listener()
    try:
        async with asyncio.timeout(90):
            with pytest.raises(Exception, match="is forbidden"):
                await watching.watch(listener, credentials, OperatorConfig(), ready=asyncio.Event(), webhook=None)
    finally:
        house.cluster.kubectl(*change, json.dumps({"rules": role["rules"]}))
