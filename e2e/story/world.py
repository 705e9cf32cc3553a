"""The cluster as the story uses it: Helm, kubectl, pods, metrics, and what to print when a step fails.

Metrics are read through the API server's proxy to the pod, so they need no route to pod addresses.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.chart import CHART, NAMESPACE, RELEASE
from support.cluster import ClusterFailed

from story.place import Place

TEAM = "team-a"
SERVICE = "demo"
OPERATOR = f"{RELEASE}-operator"
WORKERS = ("prefill", "decode")
ROLES = (*WORKERS, "router")
METRICS_PORTS = {"prefill": 9090, "decode": 9090, "router": 8000, "operator": 9090}
SMALL = {"requests": {"cpu": "50m", "memory": "256Mi"}}
ONE_THREAD = {"spec": {"containers": [{"name": "main", "env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}]}}
SCALABLE = {"replicas": None, "minReplicas": 1, "maxReplicas": 3, "resources": SMALL, "podTemplate": ONE_THREAD}
TIERS = {"hostMemory": "64Mi", "disk": {"size": "128Mi"}}
RESYNC_S = 5  # passes over a service that is at rest, often enough to count them
WAIT_S = 180.0  # generous: two cores, sixteen streams, and an import of torch per pod


@dataclass(slots=True, kw_only=True)
class World:
    place: Place
    url: str = ""
    notes: list[str] = field(default_factory=list)

    # ---- tools -------------------------------------------------------------------------------------------------------
    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_s: float = 240.0) -> str:
        return self.place.cluster.kubectl(*arguments, stdin=stdin, check=check, timeout_s=timeout_s)

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        programs = self.place.cluster.programs
        command = [str(programs / "helm") if programs else "helm", *arguments]
        if values is not None:
            command += ["--values", "-"]
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment["KUBECONFIG"] = str(self.place.cluster.kubeconfig)
        done = subprocess.run(
            command, input=json.dumps(values or {}), env=environment, capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def baton(self, *arguments: str) -> str:
        """Standard output of our own command, with this cluster's kubeconfig."""
        environment = {**os.environ, "KUBECONFIG": str(self.place.cluster.kubeconfig)}
        command = [str(Path(sys.executable).with_name("baton")), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def release(self, verb: str, **values: Any) -> str:
        """`helm install` or `upgrade` of the chart, waiting until its pods are Ready."""
        flags = ("--namespace", NAMESPACE, "--wait", "--timeout", "240s")
        operator = {"settings": {"resync_s": RESYNC_S}, **values.get("operator", {})}
        whole = {**self.place.values, **values, "operator": operator}
        return self.helm(verb, RELEASE, str(CHART), *flags, values=whole)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def patch_service(self, spec: Mapping[str, Any]) -> None:
        self.kubectl("patch", "isvc", SERVICE, "-n", TEAM, "--type=merge", "-p", json.dumps({"spec": spec}))

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    # ---- what is there -----------------------------------------------------------------------------------------------
    def pods(self, role: str) -> list[dict[str, Any]]:
        """Of one role and not on their way out; of the operator: `operator`."""
        if role == "operator":
            where = ("-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator")
        else:
            where = ("-n", TEAM, "-l", f"serving.baton.dev/service={SERVICE},serving.baton.dev/role={role}")
        found = self.get("pods", *where)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def names(self, role: str) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.pods(role)}

    def ready_names(self, role: str) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.ready_pods(role)}

    def all_names(self, role: str) -> set[str]:
        """Those on their way out too."""
        selector = f"serving.baton.dev/service={SERVICE},serving.baton.dev/role={role}"
        return {pod["metadata"]["name"] for pod in self.get("pods", "-n", TEAM, "-l", selector)["items"]}

    def exists(self, kind: str, name: str) -> bool:
        return bool(self.kubectl("get", kind, name, "-n", TEAM, "--ignore-not-found", "-o", "name"))

    def kill_main(self, pod: str) -> None:
        """kill -9 of the server's process, from the node: process 1 of a container cannot be killed from inside."""
        uid = self.get("pod", pod, "-n", TEAM)["metadata"]["uid"]
        victims = [
            folder.name for folder in Path("/proc").glob("[0-9]*")
            if uid in _text(folder / "cgroup") and b"baton-" in _bytes(folder / "cmdline")
        ]  # fmt: skip
        assert victims, f"no process of pod {pod}"
        for pid in victims:
            os.kill(int(pid), signal.SIGKILL)

    def service(self) -> dict[str, Any]:
        """The InferenceService; its conditions by type are `conditions(...)`."""
        found: dict[str, Any] = self.get("isvc", SERVICE, "-n", TEAM)
        return found

    def leader(self) -> str:
        """Name of the operator's pod that leads; empty: nobody."""
        leases = self.get("leases", "-n", NAMESPACE)["items"]
        return next((item["spec"].get("holderIdentity") or "" for item in leases), "")

    def leader_pod(self) -> str:
        holder = self.leader()
        return next((name for name in sorted(self.names("operator")) if name in holder), "")

    # ---- metrics -----------------------------------------------------------------------------------------------------
    def metrics_text(self, pod: str, role: str) -> str:
        namespace = NAMESPACE if role == "operator" else TEAM
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}:{METRICS_PORTS[role]}/proxy/metrics"
        return self.kubectl("get", "--raw", path)

    def total(self, role: str, sample: str, **labels: str) -> float:
        """Sum of one sample over the role's pods."""
        found = 0.0
        for pod in self.pods(role):
            for family in text_string_to_metric_families(self.metrics_text(pod["metadata"]["name"], role)):
                for item in family.samples:
                    if item.name == sample and labels.items() <= item.labels.items():
                        found += item.value
        return found

    def steps(self, pod: str, role: str) -> float:
        """How many steps of the engine one worker made."""
        found = text_string_to_metric_families(self.metrics_text(pod, role))
        return sum(item.value for family in found for item in family.samples if item.name == "baton_engine_steps_total")

    def writes(self) -> dict[str, float]:
        """How often the operator wrote, by verb and resource, its Lease left out."""
        found: dict[str, float] = {}
        for name in self.names("operator"):
            for family in text_string_to_metric_families(self.metrics_text(name, "operator")):
                for item in family.samples:
                    if item.name == "baton_operator_writes_total" and "lease" not in item.labels["resource"]:
                        key = f"{item.labels['verb']} {item.labels['resource']}"
                        found[key] = found.get(key, 0.0) + item.value
        return found

    # ---- waiting -----------------------------------------------------------------------------------------------------
    def wait(self, what: str, ok: Callable[[], object], *, timeout_s: float = WAIT_S) -> None:
        """Polls twice a second; a poll that the API server did not answer counts as not yet."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                if ok():
                    return
            except (ClusterFailed, KeyError, httpx.HTTPError) as error:
                self.notes.append(f"{what}: {error}")
            assert time.monotonic() < end, f"{what}: not after {timeout_s:.0f} s"
            time.sleep(0.5)

    def wait_ready(self, **counts: int) -> None:
        """Until the service says Ready for its newest generation and each named role has exactly so many pods."""

        def settled() -> bool:
            found = self.service()
            status = found.get("status", {})
            if status.get("observedGeneration") != found["metadata"]["generation"]:
                return False
            if conditions(found).get("Ready") != "True":
                return False
            return all(len(self.ready_pods(role)) == len(self.names(role)) == n for role, n in counts.items())

        self.wait(f"service Ready with {counts or 'all pods'}", settled)

    def wait_rolled_out(self) -> None:
        """Until every pod is of the updated revision and nothing is on its way out."""

        def complete() -> bool:
            found = self.service()
            status = found.get("status", {})
            return (
                status.get("observedGeneration") == found["metadata"]["generation"]
                and conditions(found).get("Ready") == "True"
                and conditions(found).get("Progressing") == "False"
            )

        self.wait("the rollout", complete)

    def ready_pods(self, role: str) -> list[dict[str, Any]]:
        return [pod for pod in self.pods(role) if conditions(pod).get("Ready") == "True"]

    # ---- trouble -----------------------------------------------------------------------------------------------------
    def report(self) -> str:
        """What helps when a step failed."""
        selector = f"serving.baton.dev/service={SERVICE}"
        parts: list[tuple[str, ...]] = [
            ("get", "pods", "-A", "-o", "wide"), ("get", "isvc", "-A", "-o", "yaml"),
            ("get", "events", "-n", TEAM, "--sort-by=.lastTimestamp"),
            ("get", "pods", "-n", TEAM, "-o",
             "jsonpath={range .items[*]}{.metadata.name}: {.status.conditions}{'\\n'}"),
            ("logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator", "--tail=40", "--prefix"),
            ("logs", "-n", TEAM, "-l", selector, "--tail=40", "--prefix", "--all-containers", "--ignore-errors"),
        ]  # fmt: skip
        said = [f"$ kubectl {' '.join(part)}\n{self.kubectl(*part, check=False)}" for part in parts]
        return "\n".join([*said, "notes:", *self.notes[-10:]])

    # ---- the way in --------------------------------------------------------------------------------------------------
    @contextmanager
    def way_in(self) -> Iterator[str]:
        """URL of the Service: its ClusterIP where this machine reaches it, else a forwarded port."""
        spec = self.get("service", SERVICE, "-n", TEAM)["spec"]
        address, port = spec["clusterIP"], spec["ports"][0]["port"]
        try:
            with socket.create_connection((address, port), timeout=3):
                pass
        except OSError:
            yield from self._forwarded(port)
            return
        yield f"http://{address}:{port}"

    def _forwarded(self, port: int) -> Iterator[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            local = free.getsockname()[1]
        cluster = self.place.cluster
        command = [cluster.kubectl_path, "--kubeconfig", str(cluster.kubeconfig), "port-forward", "-n", TEAM]
        process = subprocess.Popen([*command, f"service/{SERVICE}", f"{local}:{port}"], stdout=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait(10)


def conditions(item: Mapping[str, Any]) -> dict[str, str]:
    """Type -> status."""
    return {one["type"]: one["status"] for one in item.get("status", {}).get("conditions", ())}


def _bytes(path: Path) -> bytes:
    """Of a file that may have gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace")
