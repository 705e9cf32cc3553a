"""Install, apply fifteen lines, and be answered: what a newcomer sees."""

from __future__ import annotations

import re

import openai
import yaml
from story.load import LONG, MODEL, ask, ask_streamed, client
from story.network import Connections
from story.watch import PodHistory, Truth
from story.world import ROLES, SERVICE, TEAM, World, conditions
from support.chart import NAMESPACE, ROOT

SAMPLE = ROOT / "docs/samples/cpu-demo.yaml"


def test_helm_installs_and_names_the_next_command(world: World, history: PodHistory, connections: Connections) -> None:
    notes = world.release("install")
    assert "kubectl apply" in notes
    assert "kubectl get isvc" in notes
    assert len(world.ready_pods("operator")) == 2
    for namespace in (NAMESPACE, TEAM):
        labels = world.get("namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_fifteen_lines_become_a_service_and_ready_is_never_said_too_early(world: World, history: PodHistory) -> None:
    """While it comes up, each claim of `kubectl get isvc` is tried with a request."""
    text = SAMPLE.read_text()
    assert len([line for line in text.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    assert yaml.safe_load(text)["metadata"]["name"] == SERVICE

    def serves() -> bool:
        try:
            with world.way_in() as url:
                return bool(ask(url, "Hello!", tokens=4))
        except (openai.OpenAIError, OSError):
            return False

    truth = Truth(cluster=world.place.cluster, serves=serves)
    with truth.watching():
        world.kubectl("apply", "-n", TEAM, "-f", str(SAMPLE))
        world.wait_ready(prefill=1, decode=1, router=1)
        world.wait("requests while Ready", lambda: truth.confirmed >= 3 or truth.lies)
    print("\n" + "\n".join(truth.rows))
    assert not truth.lies
    assert len(truth.rows) > 1, "it was never seen unready"
    found = world.service()
    assert {kind for kind, status in conditions(found).items() if status != "True"} == {"Progressing"}
    assert found["status"]["url"] == f"http://{SERVICE}.{TEAM}.svc:8000"


def test_worker_pods_are_ready_only_with_their_gates(world: World, history: PodHistory) -> None:
    assert history.early == []
    assert world.names("prefill") | world.names("decode") <= history.gated
    for role in ("prefill", "decode"):
        for pod in world.pods(role):
            gates = {gate["conditionType"] for gate in pod["spec"]["readinessGates"]}
            assert gates == {"serving.baton.dev/router-registered", "serving.baton.dev/kv-transport"}
    transport = next(
        item for item in world.pods("prefill")[0]["status"]["conditions"] if item["type"].endswith("kv-transport")
    )
    assert re.search(r"\d", transport["message"]), "a measured probe says what it measured"


def test_the_openai_client_is_answered_whole_and_in_pieces(world: World, url: str) -> None:
    with client(url) as asking:
        assert MODEL in [model.id for model in asking.models.list()]
    whole, pieces = ask(url, "What is the capital of France?"), ask_streamed(url, "What is the capital of France?")
    assert whole
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_a_long_prompt_is_prefilled_by_prefill_and_its_kv_crosses(world: World, url: str) -> None:
    def figures() -> dict[str, float]:
        return {
            "handoffs": world.total("router", "baton_router_placed_total", how="handoff"),
            "bytes sent": world.total("prefill", "baton_kvtransfer_bytes_total", direction="out"),
            "bytes received": world.total("decode", "baton_kvtransfer_bytes_total", direction="in"),
        }

    before = figures()
    assert ask(url, LONG) == "".join(ask_streamed(url, LONG))
    after = figures()
    assert {name for name in after if after[name] > before[name]} == set(after), (before, after)


def test_status_tells_what_is_there(world: World) -> None:
    """`baton status` reads the same kubeconfig as kubectl."""
    said = world.baton("status", "-n", TEAM)
    for word in (SERVICE, "Ready", *ROLES[:2]):
        assert word in said, said
