"""`baton status` and `baton render` against a real API server. No operator runs here: the test writes its part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.test_render import BESIDE, SAMPLES, SERVICES
from support.cluster import KUBECONFIG_VARIABLE, Cluster, control_plane, why_no_control_plane

from baton_operator.crd import FOLDER

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

BATON = Path(sys.executable).with_name("baton")
GROUP = "/apis/serving.baton.dev/v1alpha1"
NOW = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """API server that knows nothing of ours yet."""
    if reason := why_no_control_plane():
        pytest.skip(reason)
    if os.environ.get(KUBECONFIG_VARIABLE):
        pytest.skip(f"needs an API server on which no operator runs, not that of {KUBECONFIG_VARIABLE}")
    with control_plane(tmp_path_factory.mktemp("cli-cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(bare: Cluster) -> Cluster:
    bare.apply(*sorted(FOLDER.glob("*.yaml")))
    bare.kubectl("create", "namespace", "team")
    return bare


def baton(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.run(
        [str(BATON), *arguments], env={**kept, "KUBECONFIG": str(config)}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def say(cluster: Cluster, ready: str, reason: str, message: str) -> None:
    """As the operator: about the present spec of service `demo` in namespace `team`."""
    path = f"{GROUP}/namespaces/team/inferenceservices/demo"
    generation = cluster.request("GET", path).body["metadata"]["generation"]
    role = {"desired": 1, "updated": 1, "ready": 1, "routable": 1, "summary": "1/1"}
    condition = {"type": "Ready", "status": ready, "reason": reason, "message": message, "lastTransitionTime": NOW}
    status: dict[str, Any] = {
        "observedGeneration": generation, "conditions": [condition], "url": "http://demo.team.svc:8000",
        "roles": {"prefill": role, "decode": role, "router": role}, "updatedRevision": "r1", "currentRevision": "r1",
    }  # fmt: skip
    kind = "application/merge-patch+json"
    answer = cluster.request("PATCH", f"{path}/status", {"status": status}, content_type=kind)
    assert answer.ok, answer.text


def test_a_cluster_without_our_kinds_is_told_how_to_get_them(bare: Cluster) -> None:
    run = baton(bare.kubeconfig, "status", "-n", "default")
    assert run.returncode == 1
    assert "the CRDs are missing; install the chart: helm install baton" in run.stderr


def test_status_from_nothing_to_ready(cluster: Cluster) -> None:
    nothing = baton(cluster.kubeconfig, "status", "-n", "team")
    assert nothing.returncode == 1
    assert "no InferenceService in namespace team; kubectl apply -n team -f docs/samples/" in nothing.stdout
    cluster.kubectl("apply", "-n", "team", "-f", str(SAMPLES / "cpu-demo.yaml"))
    unseen = baton(cluster.kubeconfig, "status", "-n", "team")
    assert unseen.returncode == 3
    assert "not Ready: NotSeen" in unseen.stdout
    say(cluster, "False", "Unschedulable", "no node takes pod x; add nodes")
    stuck = baton(cluster.kubeconfig, "status", "demo", "-n", "team")
    assert stuck.returncode == 3
    assert "why: no node takes pod x; add nodes" in stuck.stdout
    say(cluster, "True", "Serving", "serving at http://demo.team.svc:8000")
    ready = baton(cluster.kubeconfig, "status", "-A")
    assert (ready.returncode, ready.stderr) == (0, "")
    assert "demo in team: Ready" in ready.stdout
    found = json.loads(baton(cluster.kubeconfig, "status", "-n", "team", "-o", "json").stdout)
    assert [(item["name"], item["ready"]) for item in found["services"]] == [("demo", True)]
    edit = '{"spec": {"prefill": {"replicas": 2}}}'
    cluster.kubectl("patch", "isvc", "demo", "-n", "team", "--type=merge", "-p", edit)
    assert "StatusOutdated" in baton(cluster.kubeconfig, "status", "-n", "team").stdout


def test_watching_shows_every_change(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-n", "team", "-f", str(SAMPLES / "cpu-demo.yaml"))
    say(cluster, "True", "Serving", "first")
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [str(BATON), "status", "demo", "-n", "team", "--watch", "-o", "json"],
        env={**kept, "KUBECONFIG": str(cluster.kubeconfig)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["services"][0]["message"] == "first"
        say(cluster, "False", "Fetching", "second")
        second = json.loads(process.stdout.readline())["services"][0]
        assert (second["ready"], second["message"]) == (False, "second")
    finally:
        process.kill()
        process.wait()


def test_somebody_without_rights_is_told_which_to_ask_for_and_sees_what_the_rest_allow(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.kubectl("apply", "-n", "team", "-f", str(SAMPLES / "cpu-demo.yaml"))
    cluster.kubectl("create", "serviceaccount", "guest", "-n", "team")
    token = cluster.kubectl("create", "token", "guest", "-n", "team").strip()
    config = yaml.safe_load(cluster.kubectl("config", "view", "--raw", "--flatten", "--minify"))
    config["users"][0]["user"] = {"token": token}
    own = tmp_path / "guest"
    own.write_text(yaml.safe_dump(config))
    run = baton(own, "status", "-n", "team")
    assert run.returncode == 1
    assert "ask for get and list on inferenceservices.serving.baton.dev and pods" in run.stderr
    cluster.kubectl("create", "role", "seer", "-n", "team", "--verb=get,list", "--resource=inferenceservices")
    cluster.kubectl("create", "rolebinding", "seer", "-n", "team", "--role=seer", "--serviceaccount=team:guest")
    cluster.wait_until("the right to look", lambda: baton(own, "status", "-n", "team").returncode == 3)
    run = baton(own, "status", "-n", "team")
    assert "demo in team" in run.stdout
    assert "the pods may not be read" in run.stderr


@pytest.mark.parametrize("file", SERVICES, ids=lambda file: file.stem)
def test_the_api_server_takes_a_sample_and_everything_that_is_rendered_of_it(cluster: Cluster, file: Path) -> None:
    dry = ("apply", "--dry-run=server", "--validate=strict", "-n", "team", "-f")
    cluster.kubectl(*dry, str(file))
    made = baton(cluster.kubeconfig, "render", str(file), "-n", "team")
    assert made.returncode == 0, made.stderr
    taken = cluster.kubectl(*dry, "-", stdin=made.stdout)
    assert len(taken.splitlines()) == len(list(yaml.safe_load_all(made.stdout)))


@pytest.mark.parametrize("name", BESIDE)
def test_the_api_server_takes_what_lies_beside_the_samples(cluster: Cluster, name: str) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-n", "team", "-f", str(SAMPLES / name))
