"""`baton status -n`: what is said of services in a cluster, and what when the cluster cannot be asked."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.operator_world import FakeKube, FakeServer, Tree, service_object

from baton.cluster import ClusterFailed, credentials
from baton.cluster_report import ServiceReport, pod_report, report
from baton.cluster_status import Found, Scope, look
from baton.cluster_view import as_json, as_text
from baton_common.errors import ConfigError
from baton_common.kube.errors import KubeError, NotFound
from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.kinds import POD
from baton_operator.kinds import INFERENCE_SERVICE

NOW = "2026-01-01T00:00:00Z"
BATON = Path(sys.executable).with_name("baton")


def condition(kind: str, status: str = "True", reason: str = "Fine", message: str = "") -> Tree:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": NOW}


def service(name: str = "chat", *, conditions: list[Tree] | None = None, seen: int = 2, **metadata: Any) -> Tree:
    made = service_object(name)
    made["metadata"] |= {"generation": 2, **metadata}
    role = {"desired": 2, "updated": 2, "ready": 1, "routable": 1, "summary": "1/2"}
    made["status"] = {
        "observedGeneration": seen, "conditions": conditions or [condition("Ready", message="serving at http://x")],
        "roles": {"prefill": role, "router": {**role, "desired": 1}}, "url": "http://chat.ns.svc:8000",
        "currentRevision": "r1", "updatedRevision": "r2",
    }  # fmt: skip
    return made


def pod(name: str = "chat-prefill-0", *, status: Tree | None = None, gates: tuple[str, ...] = (), **more: Any) -> Tree:
    labels = {"serving.baton.dev/service": "chat", "serving.baton.dev/role": "prefill"}
    labels["serving.baton.dev/revision"] = "rev"
    notes = {"serving.baton.dev/service-name": "chat"}
    head = {"name": name, "namespace": "ns", "labels": labels, "annotations": notes}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {**head, **more},
        "spec": {"readinessGates": [{"conditionType": gate} for gate in gates]},
        "status": status or {"phase": "Running", "conditions": [condition("Ready")]},
    }  # fmt: skip


def shown(*found: ServiceReport) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(as_text(found))
    return out.getvalue()


def cluster(*objects: Tree) -> FakeServer:
    server = FakeServer()
    for item in objects:
        server.put(POD if item["kind"] == "Pod" else INFERENCE_SERVICE, item)
        if "status" in item:
            kind = POD if item["kind"] == "Pod" else INFERENCE_SERVICE
            path = kind.path(item["metadata"]["namespace"], item["metadata"]["name"])
            server.store[path]["metadata"]["generation"] = item["metadata"].get("generation", 1)
    return server


async def found(server: FakeServer, namespace: str = "ns", name: str = "") -> Found:
    return await look(FakeKube(server), Scope(namespace=namespace, name=name), server="https://api")


# ---- what a service says ---------------------------------------------------------------------------------------------
def test_a_ready_service_shows_pools_revisions_conditions_and_its_url() -> None:
    text = shown(report(service(), [pod()]))
    assert "chat in ns: Ready" in text
    assert "revision r1 -> r2" in text
    assert "http://chat.ns.svc:8000" in text
    assert ["prefill", "2", "2", "1", "1"] in [line.split() for line in text.splitlines()]
    assert "chat-prefill-0" not in text  # it works: nothing to say


def test_what_is_not_ready_says_why_and_what_to_do() -> None:
    words = "no node takes pod chat-prefill-0: 0/3 nodes; add nodes that fit the profile"
    text = shown(report(service(conditions=[condition("Ready", "False", "Unschedulable", words)]), []))
    assert "not Ready: Unschedulable" in text
    assert f"why: {words}" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"seen": 1}, "StatusOutdated"), ({"deletionTimestamp": NOW}, "Deleting")],
)
def test_a_ready_that_is_not_about_the_present_spec_does_not_count(changes: Tree, reason: str) -> None:
    found = report(service(**changes), [])
    assert (found.ready, found.reason) == (False, reason)
    assert found.message


def test_a_service_that_no_operator_has_seen_says_so() -> None:
    found = report({**service(), "status": {}}, [])
    assert (found.ready, found.reason) == (False, "NotSeen")
    assert "baton-system" in found.message


def test_a_pods_own_trouble_is_told_with_its_remedy() -> None:
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}, "image": "w:1"}
    status = {"phase": "Pending", "containerStatuses": [{"name": "main", "restartCount": 3, **waiting}]}
    found = pod_report(pod(status=status))
    assert (found.state, found.reason, found.restarts) == ("ImagePullBackOff", "ImageUnavailable", 3)
    assert "check the images" in found.message
    assert "ImageUnavailable: pod chat-prefill-0 cannot get image w:1" in shown(report(service(), [pod(status=status)]))


@pytest.mark.parametrize(
    ("conditions", "reason", "words"),
    [
        ([], "NotRegistered", "no router"),
        ([condition(REGISTERED_GATE)], "TransportNotProved", "no KV has crossed"),
        (
            [condition(REGISTERED_GATE), condition(TRANSPORT_GATE, "False", "ProbeFailed", "no route to decode-1")],
            "TransportNotProved", "no route to decode-1",
        ),
    ],
)  # fmt: skip
def test_a_pod_that_only_waits_for_a_gate_names_it(conditions: list[Tree], reason: str, words: str) -> None:
    ready = [condition("Ready", "False"), condition("ContainersReady"), *conditions]
    found = pod_report(pod(status={"phase": "Running", "conditions": ready}, gates=(REGISTERED_GATE, TRANSPORT_GATE)))
    assert found.reason == reason
    assert words in found.message


def test_a_pod_that_only_needs_time_has_no_reason() -> None:
    status = {"phase": "Running", "conditions": [condition("Ready", "False"), condition("ContainersReady", "False")]}
    found = pod_report(pod(status=status, gates=(REGISTERED_GATE,)))
    assert (found.ready, found.reason, found.state) == (False, "", "running")


def test_the_figures_of_the_transport_probe_are_shown() -> None:
    ready = [condition("Ready"), condition(TRANSPORT_GATE, message="1.2 GB/s to chat-decode-0 by tcp")]
    text = shown(report(service(), [pod(status={"phase": "Running", "conditions": ready})]))
    assert "1.2 GB/s to chat-decode-0 by tcp" in text


def test_of_several_services_each_has_a_row_and_only_the_unready_ones_are_told_whole() -> None:
    bad = service("bad", conditions=[condition("Ready", "False", "Fetching", "being fetched")])
    text = shown(report(service("good"), []), report(bad, []))
    assert "good in ns" not in text
    assert "bad in ns: not Ready: Fetching" in text
    assert [line.split()[:3] for line in text.splitlines()][1:3] == [["ns", "good", "yes"], ["ns", "bad", "Fetching"]]


def test_what_a_cluster_says_is_shown_as_it_is() -> None:
    text = shown(report(service(conditions=[condition("Ready", "False", "Odd", "[red]pod[/red] [/x]")]), []))
    assert "[red]pod[/red] [/x]" in text


def test_json_has_the_same() -> None:
    [item] = json.loads(as_json([report(service(), [pod()])]))["services"]
    assert (item["ready"], item["url"], item["updated_revision"]) == (True, "http://chat.ns.svc:8000", "r2")
    assert item["pods"][0]["name"] == "chat-prefill-0"
    assert item["pools"][0] == {"role": "prefill", "desired": 2, "updated": 2, "ready": 1, "routable": 1}


# ---- looking ---------------------------------------------------------------------------------------------------------
async def test_exit_status_0_when_all_are_ready_3_when_one_is_not_1_when_there_is_none() -> None:
    assert (await found(cluster(service(), pod()))).status == 0
    bad = service("bad", conditions=[condition("Ready", "False")])
    assert (await found(cluster(service(), bad))).status == 3
    assert (await found(cluster())).status == 1


async def test_pods_go_to_the_service_that_they_serve() -> None:
    other = pod("other-0", annotations={"serving.baton.dev/service-name": "other"})
    [one] = (await found(cluster(service(), pod(), other))).services
    assert [item.name for item in one.pods] == ["chat-prefill-0"]


async def test_a_service_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ClusterFailed, match="no InferenceService chta in namespace ns; there are: chat"):
        await found(cluster(service()), name="chta")
    assert [item.name for item in (await found(cluster(service(), service("b")), name="chat")).services] == ["chat"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotFound("404", status=404), "the CRDs are missing; install the chart: helm install baton"),
        (KubeError("User x cannot list", status=403), "User x cannot list; ask for get and list on inferenceservices"),
        (KubeError("Unauthorized", status=401), "does not know you .Unauthorized.; log in again"),
        (KubeError("the API server does not answer (refused)"), "is the cluster at https://api up"),
    ],
)
async def test_each_refusal_says_what_to_do(error: KubeError, words: str) -> None:
    server = FakeServer()

    def refuse(verb: str, path: str) -> None:
        raise error

    server.before = refuse
    with pytest.raises(ClusterFailed, match=words):
        await found(server)


async def test_where_pods_may_not_be_read_the_rest_is_shown_and_that_is_said() -> None:
    server = cluster(service())

    def refuse(verb: str, path: str) -> None:
        if path.endswith("/pods"):
            raise KubeError("pods is forbidden", status=403)

    server.before = refuse
    seen = await found(server)
    assert [item.ready for item in seen.services] == [True]
    assert "ask for list on pods in namespace ns" in seen.note


# ---- the way there ---------------------------------------------------------------------------------------------------
def kubeconfig(file: Path, server: str = "https://127.0.0.1:1") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({
        "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": server}}], "users": [{"name": "u", "user": {"token": "t"}}],
    }))  # fmt: skip
    return file


def test_the_flag_wins_over_the_variable_and_that_over_the_home_folder(tmp_path: Path) -> None:
    flag, variable = kubeconfig(tmp_path / "f", "https://flag"), kubeconfig(tmp_path / "v", "https://variable")
    kubeconfig(tmp_path / ".kube" / "config", "https://home")
    environment = {"KUBECONFIG": f"{tmp_path / 'absent'}:{variable}"}
    assert credentials(flag, environment, home=tmp_path).server == "https://flag"
    assert credentials(None, environment, home=tmp_path).server == "https://variable"
    assert credentials(None, {}, home=tmp_path).server == "https://home"


def test_no_kubeconfig_several_or_an_absent_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cluster: give --kubeconfig FILE or set KUBECONFIG"):
        credentials(None, {}, home=tmp_path)
    both = f"{kubeconfig(tmp_path / 'a')}:{kubeconfig(tmp_path / 'b')}"
    with pytest.raises(ConfigError, match=r"several files .*--kubeconfig"):
        credentials(None, {"KUBECONFIG": both}, home=tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read .*gone"):
        credentials(None, {"KUBECONFIG": str(tmp_path / "gone")}, home=tmp_path)


def typed(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KUBE", "XDG"))}
    environment = {**kept, "HOME": str(home), **variables}
    return subprocess.run(
        [str(BATON), "status", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_every_mistake_is_one_line(tmp_path: Path) -> None:
    config = str(kubeconfig(tmp_path / "k"))
    for arguments, status, words in (
        (("-n", "x"), 2, "no cluster"),
        (("-n", "x", "--kubeconfig", config), 1, "is the cluster at https://127.0.0.1:1 up"),
        (("-n", "x", "-A", "--kubeconfig", config), 2, "drop one"),
        (("-A", "chat", "--kubeconfig", config), 2, "give -n NAMESPACE"),
        (("-n", "x", "-o", "yaml", "--kubeconfig", config), 2, "use text or json"),
        (("-w",), 2, "add -n NAMESPACE or -A"),
        (("--kubeconfig", config), 2, "add -n NAMESPACE or -A"),
        (("a", "--name", "b"), 2, "two names"),
    ):
        run = typed(tmp_path, *arguments)
        assert run.returncode == status, arguments
        [line] = run.stderr.splitlines()
        assert words in line


def test_without_a_namespace_it_is_about_this_machine_whatever_KUBECONFIG_says(tmp_path: Path) -> None:
    run = typed(tmp_path, KUBECONFIG=str(tmp_path / "absent"))
    assert (run.returncode, run.stdout) == (1, "baton: no service is running\n")
