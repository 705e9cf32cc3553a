"""The chart on a real cluster, by real Helm: install, reconcile, upgrade, remove, install again, and in one namespace.

One story in order: each test goes on from the one before. The operator's image comes from tools/make_images.py; models
are not served here (that is the e2e), so a service stops at fetching, with all its objects made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import cluster
from support.chart import CHART, COMBINATIONS, NAMESPACE, RELEASE, render, tool

REASON = cluster.why_no_node() or ("" if shutil.which("mmdebstrap") else "the images' base needs mmdebstrap")
pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(REASON), reason=REASON),
]  # fmt: skip

INDEX = 3  # other cluster tests may run beside these
STATE = Path.home() / ".cache/baton/chart-cluster"
IMAGES = Path.home() / ".cache/baton/images"
OPTIONAL = ("servicemonitors", "podmonitors", "prometheusrules")
DEPLOYMENT = f"deployment/{RELEASE}-operator"


class World:
    """The cluster with Helm, and the image's tag."""

    def __init__(self, running: cluster.Cluster, tag: str) -> None:
        self.cluster, self.tag = running, tag

    def helm(self, *arguments: str, values: dict[str, Any] | None = None) -> str:
        assert self.cluster.programs is not None
        command = [str(self.cluster.programs / "helm"), *arguments]
        if values is not None:
            command += ["--values", "-"]
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        done = subprocess.run(
            command, input=json.dumps(values or {}), env={**environment, "KUBECONFIG": str(self.cluster.kubeconfig)},
            capture_output=True, text=True, check=False, timeout=360,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}\n{self.report()}"
        return done.stdout

    def release(self, verb: str, chart: Path = CHART, **values: Any) -> str:
        """`helm install` or `upgrade` of the release, waiting until its pods are Ready."""
        flags = ("--namespace", NAMESPACE, "--wait", "--timeout", "300s")
        return self.helm(verb, RELEASE, str(chart), *flags, values={"image": {"tag": self.tag}, **values})

    def get(self, *arguments: str) -> Any:
        return json.loads(self.cluster.kubectl("get", *arguments, "-o", "json"))

    def names(self, *arguments: str) -> set[str]:
        return {item["metadata"]["name"] for item in self.get(*arguments)["items"]}

    def report(self) -> str:
        """What helps when something is not Ready."""
        parts = (("get", "pods,events", "-A"), ("logs", "-n", NAMESPACE, DEPLOYMENT, "--all-pods", "--tail=60"))
        return "\n".join(self.cluster.kubectl(*part, check=False) for part in parts)

    def pods(self) -> list[dict[str, Any]]:
        """Of the operator, living."""
        selector = "app.kubernetes.io/component=operator"
        found = self.get("pods", "-n", NAMESPACE, "-l", selector)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def calls(self) -> dict[tuple[str, str, str], float]:
        """(verb, resource, code) -> how often, over all replicas, as the operator's own metrics tell."""
        found: dict[tuple[str, str, str], float] = {}
        for pod in self.pods():
            url = f"http://{pod['status']['podIP']}:9090/metrics"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            text = opener.open(url, timeout=10).read().decode()
            for labels, value in re.findall(r"^baton_operator_api_calls_total\{(.*)\} (\S+)$", text, re.MULTILINE):
                label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                key = (label["verb"], label["resource"], label["code"])
                found[key] = found.get(key, 0) + float(value)
        return found

    def refused(self) -> set[tuple[str, str]]:
        """What the operator asked for and had no right to."""
        return {(verb, resource) for verb, resource, code in self.calls() if code in ("401", "403")}

    def webhook(self) -> tuple[dict[str, str], str]:
        """The contents of its Secret, and the bundle that the API server trusts."""
        [hook] = self.get("validatingwebhookconfiguration", f"{NAMESPACE}-{RELEASE}-operator-webhook")["webhooks"]
        secret = self.get("secret", f"{RELEASE}-operator-webhook", "-n", NAMESPACE)
        return secret.get("data", {}), hook["clientConfig"].get("caBundle", "")

    def logs(self) -> str:
        return "".join(
            self.cluster.kubectl("logs", "-n", NAMESPACE, pod["metadata"]["name"]) for pod in self.pods()
        )

    def leader(self) -> str:
        leases = self.get("leases", "-n", NAMESPACE)["items"]
        holders = [item["spec"].get("holderIdentity") or "" for item in leases]
        return holders[0] if holders else ""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    kit = cluster.kit()
    assert kit is not None
    made = tool("make_images").make(kit, IMAGES, ["operator", "router", "worker"])
    mounts = [part for mount in made["mounts"] for part in ("--mount", mount)]
    with cluster.node(STATE, index=INDEX, options=mounts) as running:
        cluster.load_images(STATE, *map(Path, made["archives"]))
        for name in (NAMESPACE, "team-a", "team-b"):
            label = {"pod-security.kubernetes.io/enforce": "restricted"}
            running.kubectl(
                "apply", "-f", "-", stdin=json.dumps({
                    "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": label},
                }),
            )  # fmt: skip
        yield World(running, made["tag"])


def service(name: str, namespace: str) -> str:
    return yaml.safe_dump({
        "apiVersion": "serving.baton.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "profile": "cpu", "model": {"uri": "hf://nobody/nothing"},
            "prefill": {"replicas": 1}, "decode": {"replicas": 1},
        },
    })  # fmt: skip


def monitoring_kinds() -> str:
    """The Prometheus operator's kinds, by name only."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced",
                "names": {"plural": plural, "kind": kind, "singular": kind.lower(), "listKind": f"{kind}List"},
                "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": True,
                }}}],
            },
        }
        for plural, kind in zip(OPTIONAL, ("ServiceMonitor", "PodMonitor", "PrometheusRule"), strict=True)
    ]})  # fmt: skip


def test_helm_finds_nothing_wrong(world: World) -> None:
    assert "0 chart(s) failed" in world.helm("lint", "--strict", str(CHART))


def test_install_makes_ready_pods_in_a_restricted_namespace(world: World) -> None:
    notes = world.release("install")
    assert "kubectl get isvc" in notes
    pods = world.pods()
    assert len(pods) == 2
    for pod in pods:
        assert {item["type"]: item["status"] for item in pod["status"]["conditions"]}["Ready"] == "True"
        assert all(status["restartCount"] == 0 for status in pod["status"]["containerStatuses"])
    world.cluster.wait_until("a leader", world.leader, timeout_s=60)
    assert {"inferenceservices.serving.baton.dev", "acceleratorprofiles.serving.baton.dev"} <= world.names("crd")
    assert {"cpu", "h200", "gb200", "mi355x"} <= world.names("acceleratorprofiles")


def test_apply_is_answered_by_the_webhook_of_the_release(world: World) -> None:
    def apply(**spec: Any) -> str:
        """A dry run, through the Service to any of the replicas."""
        item = yaml.safe_load(service("asked", "team-a"))
        item["spec"].update(spec)
        words = ("apply", "--dry-run=server", "-f", "-")
        return world.cluster.kubectl(*words, stdin=json.dumps(item), check=False)

    refused = "denied the request: NotSupported: prefill wants"
    unfit = {"profile": "h200", "parallelism": {"tensor": 2}}
    world.cluster.wait_until("a refusal", lambda: refused in apply(**unfit), timeout_s=180)
    assert "Warning: there is no AcceleratorProfile h100; create it" in apply(profile="h100")
    assert "Warning" not in apply()
    data, bundle = world.webhook()
    assert set(data) == {"ca.crt", "ca.key", "tls.crt", "tls.key"}
    assert data["ca.crt"] == bundle


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_api_server_takes_every_object_of_every_combination(world: World, name: str) -> None:
    """Server-side dry run, with strict field validation."""
    world.cluster.kubectl("apply", "-f", "-", stdin=monitoring_kinds())
    world.cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    whole = {"apiVersion": "v1", "kind": "List", "items": render(COMBINATIONS[name])}
    world.cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-",
        stdin=json.dumps(whole),
    )  # fmt: skip


def test_the_operator_has_the_rights_that_it_needs(world: World) -> None:
    """A service is planned and all its objects are made, its Role among them; nothing was ever forbidden."""
    world.cluster.kubectl("apply", "-f", "-", stdin=service("first", "team-a"))
    wanted = {"first-prefill", "first-decode", "first-router"}
    world.cluster.wait_until("Deployments", lambda: wanted <= world.names("deployments", "-n", "team-a"), timeout_s=90)
    world.cluster.wait_until("a Role", lambda: world.names("roles", "-n", "team-a"), timeout_s=60)
    status = world.get("isvc", "first", "-n", "team-a")["status"]
    conditions = {item["type"]: item for item in status["conditions"]}
    assert conditions["Accepted"]["status"] == "True", conditions
    assert conditions["Ready"]["status"] == "False"
    assert conditions["Ready"]["reason"]
    assert world.refused() == set()
    assert "orbidden" not in world.logs()
    used = {(verb, resource) for verb, resource, code in world.calls() if code.startswith("2")}
    assert ("apply", "roles.rbac.authorization.k8s.io") in used


@pytest.mark.parametrize(
    ("image", "program"),
    [
        ("operator", "baton-operator"), ("router", "baton-router"),
        ("worker", "baton-decode"), ("worker", "baton-prefill"),
    ],
)
def test_every_image_holds_its_program(world: World, image: str, program: str) -> None:
    """Run to the end in a restricted pod with a read-only root file system; torch only where it belongs."""
    tag = world.tag + ("-cpu" if image == "worker" else "")
    torch = "import torch" if image == "worker" else "import importlib.util as u; assert u.find_spec('torch') is None"
    security = {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    name = f"try-{program}"
    container = {
        "name": "try", "image": f"baton/{image}:{tag}", "imagePullPolicy": "IfNotPresent", "securityContext": security,
        "command": ["sh", "-c", f'{program} --explain && python -c "{torch}"'],
    }  # fmt: skip
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "team-b"},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    }  # fmt: skip
    world.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    ended = ("Succeeded", "Failed")
    world.cluster.wait_until(
        name, lambda: world.get("pod", name, "-n", "team-b")["status"]["phase"] in ended, timeout_s=60
    )
    said = world.cluster.kubectl("logs", name, "-n", "team-b")
    assert world.get("pod", name, "-n", "team-b")["status"]["phase"] == "Succeeded", said
    assert "log_level" in said


def test_an_idle_operator_is_small(world: World) -> None:
    """The kubelet's own figure of the working set."""
    node = world.get("nodes")["items"][0]["metadata"]["name"]
    summary = json.loads(world.cluster.kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
    used = [
        pod["memory"]["workingSetBytes"]
        for pod in summary["pods"]
        if pod["podRef"]["namespace"] == NAMESPACE and "workingSetBytes" in pod.get("memory", {})
    ]
    assert used
    assert max(used) < 120e6, used
    print("operator working set, MB:", [round(one / 1e6) for one in used])


def test_upgrade_keeps_what_is_there_and_brings_new_crds(world: World, tmp_path: Path) -> None:
    before = {item["metadata"]["name"]: item["metadata"]["uid"] for item in world.get("acceleratorprofiles")["items"]}
    newer = tmp_path / "baton"
    shutil.copytree(CHART, newer)
    crd = newer / "files/crds/serving.baton.dev_inferenceservices.yaml"
    column = "    additionalPrinterColumns:\n    - {name: Newer, type: string, jsonPath: .metadata.name}\n"
    text = crd.read_text()
    assert "    additionalPrinterColumns:\n" in text
    crd.write_text(text.replace("    additionalPrinterColumns:\n", column, 1))
    profile = newer / "files/profiles/extra.yaml"
    profile.write_text((newer / "files/profiles/cpu.yaml").read_text().replace("name: cpu", "name: extra"))
    certificate = world.webhook()
    world.release("upgrade", newer, operator={"log": {"level": "debug"}})
    assert world.webhook() == certificate
    columns = world.get("crd", "inferenceservices.serving.baton.dev")["spec"]["versions"][0]["additionalPrinterColumns"]
    assert columns[0]["name"] == "Newer"
    after = {item["metadata"]["name"]: item["metadata"]["uid"] for item in world.get("acceleratorprofiles")["items"]}
    assert after.items() >= before.items()  # the same objects: no moment without them
    assert "extra" in after
    assert world.names("isvc", "-n", "team-a") == {"first"}
    assert len(world.pods()) == 2


def test_removing_the_release_leaves_what_users_made(world: World) -> None:
    world.helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait")
    selector = ("-l", f"app.kubernetes.io/instance={RELEASE}")
    kinds = (
        "deployments,services,configmaps,secrets,serviceaccounts,networkpolicies,poddisruptionbudgets,roles,"
        "rolebindings"
    )
    assert world.names(kinds, "-n", NAMESPACE, *selector) == set()
    assert world.names("clusterroles,clusterrolebindings,validatingwebhookconfigurations", *selector) == set()
    assert world.names("isvc", "-n", "team-a") == {"first"}
    assert "first-decode" in world.names("deployments", "-n", "team-a")  # services go on serving
    assert "cpu" in world.names("acceleratorprofiles")


def test_installed_again_it_finds_everything_and_removes_a_deleted_service(world: World) -> None:
    world.release("install")
    world.cluster.kubectl("delete", "isvc", "first", "-n", "team-a", "--timeout=60s")
    world.cluster.wait_until(
        "an empty namespace", lambda: not world.names("deployments,services,roles", "-n", "team-a"), timeout_s=30
    )
    assert world.refused() == set()


def test_in_one_namespace_it_serves_that_one_only(world: World) -> None:
    world.release("upgrade", watch={"namespaces": ["team-a"]}, operator={"replicas": 1})
    world.cluster.wait_until("one replica", lambda: len(world.pods()) == 1)
    for namespace in ("team-a", "team-b"):
        world.cluster.kubectl("apply", "-f", "-", stdin=service("second", namespace))
    world.cluster.wait_until("Deployments", lambda: "second-decode" in world.names("deployments", "-n", "team-a"))
    assert world.names("deployments", "-n", "team-b") == set()
    # where the API server lives is looked up when that is allowed, and not needed
    assert world.refused() <= {("list", "endpointslices.discovery.k8s.io"), ("get", "services")}
    world.cluster.kubectl("delete", "isvc", "second", "-n", "team-a", "--timeout=60s")
