"""NetworkPolicies against the connections that the story really made: each allowed, none wider than used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from story.network import HOST, NODE_ADDRESSES, Connections, Grant, Judge
from story.prometheus import Prometheus
from story.watch import PodHistory, Seen
from story.world import TEAM, World
from support.chart import NAMESPACE

PROMETHEUS = Seen(name="prometheus", namespace="monitoring", labels={})  # it runs beside the cluster: see docs
UNUSED = {
    "TCP/53": "answers that do not fit a datagram",
    "UDP/53": "addresses as numbers: names come with a model's server",
    "TCP/443": "the API server's other usual port",
}


@pytest.fixture(scope="module")
def judge(world: World, connections: Connections, history: PodHistory) -> Judge:
    if world.place.node_pid is None:
        pytest.skip("the node is not ours to observe")
    policies = [item for name in (TEAM, NAMESPACE) for item in world.get("networkpolicies", "-n", name)["items"]]
    assert policies
    return Judge(policies=policies, history=history, stands_for={HOST: PROMETHEUS})


def excused(grant: Grant, scraped: bool) -> bool:
    if f"{grant.protocol}/{grant.port}" in UNUSED:
        return True
    return grant.port in (9090, "metrics") and not scraped


def test_every_connection_that_was_made_is_allowed(judge: Judge, connections: Connections) -> None:
    own = [met for met in connections.met if met.source not in NODE_ADDRESSES]
    named = sorted({f"{judge.name(met.source)} -> {judge.name(met.target)} {met.protocol}/{met.port}" for met in own})
    print("\n" + "\n".join(named))
    assert any("router -> prefill TCP/9000" in line for line in named), "nothing was observed"
    assert [refusal for met in own if (refusal := judge.refused(met))] == []


def test_no_policy_allows_more_than_was_used(
    judge: Judge, connections: Connections, prometheus: Prometheus | None
) -> None:
    """Here the node counts as well: the API server calls the operator's webhook."""
    unused = [grant for grant in judge.grants() if not any(judge.used(grant, met) for met in connections.met)]
    assert [str(grant) for grant in unused if not excused(grant, prometheus is not None)] == []


@pytest.mark.parametrize("name", [f"demo-{role}" for role in ("prefill", "decode", "router")])
def test_the_judge_refuses_what_a_missing_policy_would_have_allowed(
    judge: Judge, connections: Connections, name: str
) -> None:
    """The judgement above can fail: without one policy's rules, its own connections are refused."""

    def emptied(policy: Mapping[str, Any]) -> Mapping[str, Any]:
        changed: dict[str, Any] = json.loads(json.dumps(policy))
        if changed["metadata"]["name"] == name:
            changed["spec"].update(ingress=[], egress=[])
        return changed

    stricter = Judge(policies=[emptied(one) for one in judge.policies], history=judge.history)
    assert any(stricter.refused(met) for met in connections.met)
