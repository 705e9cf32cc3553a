"""Witnesses that run beside the story: every state of every pod, and what `kubectl get isvc` claims.

They only look. A finding is kept as text; the story asserts that there is none.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.cluster import Cluster, ClusterFailed

from story.world import SERVICE, TEAM, conditions

WORKERS = ("prefill", "decode", "colocated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A pod at an address, with the labels that policies select by."""

    name: str
    namespace: str
    labels: Mapping[str, str]
    ports: Mapping[str, int] = field(default_factory=dict)  # by name

    @property
    def role(self) -> str:
        return self.labels.get("serving.baton.dev/role") or self.labels.get("app.kubernetes.io/component", self.name)


@dataclass(slots=True, kw_only=True)
class PodHistory:
    """Follows a watch of all pods. Addresses are not given out again soon, so one pod per address is enough."""

    cluster: Cluster
    by_address: dict[str, Seen] = field(default_factory=dict)
    pods: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by uid, those that live now
    restarts: dict[str, int] = field(default_factory=dict)
    early: list[str] = field(default_factory=list)  # became Ready without its gates
    gated: set[str] = field(default_factory=set)    # became Ready with all of them
    _were_ready: set[str] = field(default_factory=set)
    _process: subprocess.Popen[str] | None = None
    _ended: bool = False

    @contextmanager
    def following(self) -> Iterator[PodHistory]:
        thread = threading.Thread(target=self._follow, name="pods", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended = True
            if self._process is not None:
                self._process.terminate()
            thread.join(10)

    def _follow(self) -> None:
        command = [self.cluster.kubectl_path, "--kubeconfig", str(self.cluster.kubeconfig)]
        while not self._ended:  # a watch ends after some minutes
            watch = [*command, "get", "--raw", "/api/v1/pods?watch=1"]
            self._process = subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert self._process.stdout is not None
            for line in self._process.stdout:
                event = json.loads(line)
                if event.get("object", {}).get("kind") == "Pod":
                    self._take(event["type"], event["object"])
            self._process.wait()

    def _take(self, event: str, pod: Mapping[str, Any]) -> None:
        metadata, status = pod["metadata"], pod.get("status", {})
        if event == "DELETED":
            self.pods.pop(metadata["uid"], None)
            return
        self.pods[metadata["uid"]] = pod
        name, labels = metadata["name"], metadata.get("labels", {})
        if address := status.get("podIP"):
            ports = {
                port.get("name", ""): port["containerPort"]
                for container in pod["spec"]["containers"] for port in container.get("ports", ())
            }  # fmt: skip
            self.by_address[address] = Seen(name=name, namespace=metadata["namespace"], labels=labels, ports=ports)
        for container in status.get("containerStatuses", ()):
            self.restarts[name] = max(self.restarts.get(name, 0), container["restartCount"])
        found = conditions(pod)
        if labels.get("serving.baton.dev/role") not in WORKERS or found.get("Ready") != "True":
            return
        # Only the first time: a gate that closes later comes before the kubelet's answer to it, and when a container
        # that has restarted is ready, the kubelet computes Ready from the gates it last synced, and then corrects it.
        if metadata["uid"] in self._were_ready:
            return
        self._were_ready.add(metadata["uid"])
        gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", ())]
        open_gates = [gate for gate in gates if found.get(gate) == "True"]
        if gates and open_gates == gates:
            self.gated.add(name)
        else:
            self.early.append(f"{name} is Ready with {open_gates} of {gates}")


@dataclass(slots=True, kw_only=True)
class Truth:
    """Compares column READY with a request. `serves`: makes one and says whether it was answered."""

    cluster: Cluster
    serves: Callable[[], bool]
    lies: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # each row once, when it changed
    confirmed: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[Truth]:
        thread = threading.Thread(target=self._watch, name="truth", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(150)

    def _watch(self) -> None:
        while not self._stop.is_set():
            if self._ready():
                if self.serves():
                    self.confirmed += 1
                elif self._ready():  # it said so before and after a request that failed
                    self.lies.append(f"{time.strftime('%X')} Ready, but a request failed: {self.rows[-1]}")
            self._stop.wait(0.5)

    def _ready(self) -> bool:
        """What a user reads."""
        try:
            head, *rows = self.cluster.kubectl("get", "isvc", SERVICE, "-n", TEAM).splitlines()
        except (ClusterFailed, ValueError):
            return False
        columns = head.split()
        row = rows[0].split()
        shown = " ".join(row[:-1])  # without the age
        if not self.rows or self.rows[-1] != shown:
            self.rows.append(shown)
        return row[columns.index("READY")] == "True"
