"""The operator's surroundings in memory: an API server that applies, patches and deletes, and can fail at any call.

`FakeKube` is the real client down to its one method that touches the network. Server-side apply is simulated per
manager: fields that a manager applied before and leaves out now are removed. Lists are replaced as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from baton_common.clock import ManualClock
from baton_common.kube.client import APPLY, STRATEGIC, KubeClient
from baton_common.kube.credentials import Credentials
from baton_common.kube.errors import Conflict, KubeError, NotFound
from baton_common.kube.kinds import POD, Kind
from baton_operator.apply import Applier
from baton_operator.kinds import ACCELERATOR_PROFILE, CHILD_KINDS, DEPLOYMENT, INFERENCE_SERVICE
from baton_operator.plan.intake import Platform
from baton_operator.prerequisites import ClusterFacts
from baton_operator.reconcile import Outcome, Reconciler
from baton_operator.recorder import EventRecorder

Tree = dict[str, Any]
KINDS = {kind.plural: kind for kind in (*CHILD_KINDS, INFERENCE_SERVICE, ACCELERATOR_PROFILE, POD)}
PLATFORM = Platform(router_image="local/router:1", worker_image="local/worker:1-{flavour}")
WRITES = ("apply", "patch", "create", "update", "delete")


class Crash(BaseException):
    """The process dies here: nothing may catch it."""


def service_object(name: str = "chat", **spec: Any) -> Tree:
    return {
        "apiVersion": "serving.baton.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "ns"},
        "spec": {"model": {"uri": "hf://Qwen/Qwen3-0.6B"}, "profile": "cpu", **spec},
    }


def profile_object(name: str = "cpu", **spec: Any) -> Tree:
    basics = {"device": "cpu", "workerResources": {"requests": {"cpu": "500m", "memory": "1Gi"}}}
    return {
        "apiVersion": "serving.baton.dev/v1alpha1",
        "kind": "AcceleratorProfile",
        "metadata": {"name": name},
        "spec": {**basics, **spec},
    }


@dataclass
class FakeServer:
    """Objects by URL path. `before` is asked at every call and may raise."""

    store: dict[str, Tree] = field(default_factory=dict)
    applied: dict[tuple[str, str], Tree] = field(default_factory=dict)  # (path, manager) -> last applied
    calls: list[tuple[str, str]] = field(default_factory=list)          # (verb, path)
    before: Callable[[str, str], None] = lambda verb, path: None
    after: Callable[[str, str], None] = lambda verb, path: None
    serial: int = 0

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [call for call in self.calls if call[0] in WRITES and "/events" not in call[1]]

    def put(self, kind: Kind, item: Tree) -> Tree:
        """As a user would: generation counts changes of the spec."""
        metadata = item["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        old = self.store.get(path, {})
        new = copy.deepcopy(item)
        kept = {key: old["metadata"][key] for key in ("uid", "finalizers") if key in old.get("metadata", {})}
        new["metadata"] = {**new["metadata"], **kept}
        if "status" in old:
            new.setdefault("status", old["status"])
        return self._save(path, new)

    def get(self, kind: Kind, name: str, namespace: str = "ns") -> Tree | None:
        return self.store.get(kind.path(namespace, name))

    def children(self) -> dict[str, Tree]:
        plurals = {kind.plural for kind in CHILD_KINDS}
        return {path: item for path, item in self.store.items() if path.split("/")[-2] in plurals}

    def delete(self, path: str) -> None:
        item = self.store[path]
        if item["metadata"].get("finalizers"):
            item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del self.store[path]
            self.applied = {key: value for key, value in self.applied.items() if key[0] != path}

    def _save(self, path: str, item: Tree) -> Tree:
        old = self.store.get(path)
        metadata = item["metadata"]
        if old is not None and _without_version(old) == _without_version(item):
            return old
        self.serial += 1
        metadata.setdefault("uid", f"uid-{self.serial}")
        metadata["resourceVersion"] = str(self.serial)
        changed = old is None or old.get("spec") != item.get("spec")
        metadata["generation"] = (old or {}).get("metadata", {}).get("generation", 0) + changed
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.store.pop(path, None)
        else:
            self.store[path] = item
        return item

    def answer(self, verb: str, path: str, query: Mapping[str, str], body: Tree | None, content: str) -> Tree:
        self.before(verb, path)
        self.calls.append((verb, path))
        result = self._answer(verb, path, query, body or {}, content)
        self.after(verb, path)
        return copy.deepcopy(result)

    def _answer(self, verb: str, path: str, query: Mapping[str, str], body: Tree, content: str) -> Tree:
        status = path.endswith(("/status", "/scale"))
        place = path.rpartition("/")[0] if status else path
        if verb == "list":
            return {"metadata": {}, "items": self._matching(path, query.get("labelSelector", ""))}
        if verb == "create":
            place = f"{path}/{body['metadata']['name']}"
            if place in self.store:
                raise Conflict("exists", status=409)
            return self._save(place, copy.deepcopy(body))
        if verb != "apply" and place not in self.store:
            raise NotFound(f"{path} not found", status=404)
        if verb == "get":
            return self.store[place]
        if verb == "delete":
            self.delete(place)
            return {}
        old = self.store.get(place, {})
        wanted = body.get("metadata", {})
        if wanted.get("resourceVersion") not in (None, old.get("metadata", {}).get("resourceVersion")):
            raise Conflict("changed meanwhile", status=409)
        manager = query.get("fieldManager", "")
        if content == APPLY:
            before = self.applied.get((path, manager), {})
            self.applied[path, manager] = copy.deepcopy(body)
            new = _overlay(_without(copy.deepcopy(old), before, body), body)
        elif verb == "update":
            new = copy.deepcopy(body)
            new["metadata"]["uid"] = old["metadata"]["uid"]
        else:
            new = _overlay(copy.deepcopy(old), body, by_name=content == STRATEGIC)
        new["metadata"].pop("resourceVersion", None)
        if wanted.get("finalizers") == []:
            new["metadata"]["finalizers"] = []
        return self._save(place, new)

    def _matching(self, path: str, selector: str) -> list[Tree]:
        plural, namespace = path.rpartition("/")[2], path.partition("/namespaces/")[2].partition("/")[0]
        found = []
        for own, item in self.store.items():
            parts = own.split("/")
            inside = "/namespaces/" not in path or f"/namespaces/{namespace}/" in own
            labels = item["metadata"].get("labels", {})
            wanted = dict(pair.partition("=")[::2] for pair in selector.split(",") if pair)  # no value: any
            fits = all(key in labels and value in ("", labels[key]) for key, value in wanted.items())
            if parts[-2] == plural and inside and fits:
                found.append(item)
        return found


class FakeKube(KubeClient):
    """The client on a FakeServer."""

    def __init__(self, server: FakeServer, may_write: Callable[[], bool] = lambda: True) -> None:
        credentials = Credentials(server="http://fake", namespace="ns")
        super().__init__(credentials, manager="baton-operator", clock=ManualClock(), may_write=may_write)
        self._server = server

    async def _call(self, verb: str, method: str, kind: Kind, path: str, **more: Any) -> Any:
        self._check_lead(verb, kind)
        query, body = more.get("query") or {}, more.get("body")
        return self._server.answer(verb, path, query, copy.deepcopy(body), more.get("content", ""))


@dataclass
class World:
    """A server with one profile, and operators that come and go."""

    server: FakeServer = field(default_factory=FakeServer)
    served: frozenset[Kind] = frozenset()

    def __post_init__(self) -> None:
        self.server.put(ACCELERATOR_PROFILE, profile_object())

    def operator(self) -> Reconciler:
        """A fresh process: it remembers nothing."""
        client = FakeKube(self.server)
        recorder = EventRecorder(client, identity="test", clock=ManualClock(), wall=now)
        facts = ClusterFacts(platform=PLATFORM, served=self.served)
        return Reconciler(client, recorder, facts=lambda: facts, wall=now)

    async def settle(self, name: str = "chat", operator: Reconciler | None = None, *, limit: int = 10) -> Outcome:
        """Passes until one writes nothing."""
        operator = operator or self.operator()
        for _ in range(limit):
            before = len(self.server.writes)
            try:
                outcome = await operator.reconcile("ns", name)
            except (Conflict, KubeError):
                continue
            if len(self.server.writes) == before:
                return outcome
        raise AssertionError(f"still writing after {limit} passes: {self.server.writes[-5:]}")

    def make_pods(self, *, ready: bool = True, name: str = "chat") -> None:
        """What the Deployment controller and a kubelet would do: pods of the present template, old ones gone."""
        for path in [path for path, item in self.server.store.items() if item.get("kind") == "Pod"]:
            del self.server.store[path]
        for item in list(self.server.store.values()):
            if item.get("kind") == "Deployment":
                count = item["spec"].setdefault("replicas", 1)
                template = item["spec"]["template"]
                gates = template["spec"].get("readinessGates", [])
                told = ["Ready", *(gate["conditionType"] for gate in gates)]
                for index in range(count):
                    pod = {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {
                            "name": f"{item['metadata']['name']}-{index}", "namespace": "ns",
                            "labels": dict(template["metadata"]["labels"]),
                        },
                        "spec": {"readinessGates": gates},
                        "status": {"conditions": [{"type": kind, "status": str(ready)} for kind in told]},
                    }  # fmt: skip
                    self.server.put(POD, pod)
                item["status"] = {"replicas": count}

    def status(self, name: str = "chat") -> Tree:
        found = self.server.get(INFERENCE_SERVICE, name)
        assert found is not None
        return found.get("status", {})

    def condition(self, kind: str, name: str = "chat") -> Tree:
        return next(item for item in self.status(name)["conditions"] if item["type"] == kind)

    def deployment(self, role: str, name: str = "chat") -> Tree:
        found = self.server.get(DEPLOYMENT, f"{name}-{role}")
        assert found is not None
        return found


def now() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


def applier(world: World) -> Applier:
    return Applier(FakeKube(world.server))


def _without_version(item: Tree) -> Tree:
    metadata = {key: value for key, value in item["metadata"].items() if key not in ("resourceVersion", "generation")}
    return {**item, "metadata": metadata}


def _overlay(base: Any, patch: Any, *, by_name: bool = False) -> Any:
    if by_name and isinstance(base, list) and isinstance(patch, list):
        changes = {item["name"]: item for item in patch}
        return [_overlay(item, changes.get(item["name"], {}), by_name=True) for item in base]
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(base)
    for key, value in patch.items():
        result[key] = _overlay(result.get(key), value, by_name=by_name)
    return result


def _without(live: Any, before: Any, after: Any) -> Any:
    """`live` without the fields that were in `before` and are not in `after`."""
    if not isinstance(live, dict) or not isinstance(before, dict):
        return live
    after = after if isinstance(after, dict) else {}
    for key, value in before.items():
        if key not in after:
            live.pop(key, None)
        elif key in live:
            live[key] = _without(live[key], value, after[key])
    return live
