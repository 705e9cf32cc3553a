"""The operator is upgraded, killed and taken away: what serves goes on serving, and what was asked for gets done."""

from __future__ import annotations

import time

import pytest
from story.load import Load
from story.watch import PodHistory
from story.world import OPERATOR, SERVICE, TEAM, WORKERS, World
from support.chart import NAMESPACE, RELEASE


def workers(world: World, history: PodHistory) -> dict[str, int]:
    """Uid of each pod of the service -> how often its container was started again."""
    pods = [pod for role in (*WORKERS, "router") for pod in world.pods(role)]
    return {pod["metadata"]["uid"]: history.restarts.get(pod["metadata"]["name"], 0) for pod in pods}


def passes(world: World) -> float:
    return world.total("operator", "baton_operator_reconciles_total")


@pytest.mark.parametrize("step", ["upgrade", "rollback"])
def test_another_operator_restarts_no_worker(world: World, load: Load, history: PodHistory, step: str) -> None:
    before, operators = workers(world, history), world.names("operator")
    with load.undisturbed_by(f"helm {step}"):
        if step == "upgrade":
            world.release("upgrade", operator={"log": {"level": "debug"}})
        else:
            world.helm("rollback", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "240s")
        world.wait("a new leader", lambda: world.leader_pod() not in {"", *operators})
        seen = passes(world)
        world.wait("a pass over the service", lambda: passes(world) > seen)
        world.wait_ready(prefill=1, decode=1, router=2)
    assert workers(world, history) == before


def test_the_other_replica_leads_when_the_leader_is_killed(world: World, load: Load, history: PodHistory) -> None:
    """An edit made in between is done by the new one. The time is told, not judged: the machine may be slow."""
    world.wait("two operators", lambda: len(world.ready_pods("operator")) == 2)
    before, leader = workers(world, history), world.leader_pod()
    assert leader
    with load.undisturbed_by("leader killed"):
        world.kubectl("delete", "pod", leader, "-n", NAMESPACE, "--grace-period=0", "--force")
        start_s = time.monotonic()
        world.patch_service({"router": {"service": {"annotations": {"note": "while nobody leads"}}}})
        world.wait("another leader", lambda: world.leader_pod() not in ("", leader))
        print(f"\nanother operator leads after {time.monotonic() - start_s:.1f} s")

        def done() -> bool:
            annotations = world.get("service", SERVICE, "-n", TEAM)["metadata"].get("annotations", {})
            return annotations.get("note") == "while nobody leads"

        world.wait("the edit", done)
        world.wait_ready(prefill=1, decode=1, router=2)
    assert workers(world, history) == before


def test_without_any_operator_a_new_worker_is_taken_in(world: World, load: Load, history: PodHistory) -> None:
    """The gates of its pod are opened by the routers."""
    world.kubectl("scale", f"deployment/{OPERATOR}", "-n", NAMESPACE, "--replicas=0")
    world.wait("no operator", lambda: not world.names("operator"))
    for role in WORKERS:
        (old,) = world.names(role)
        with load.undisturbed_by(f"{role} pod deleted, no operator"):
            world.kubectl("delete", "pod", old, "-n", TEAM, "--wait=false")
            world.wait(f"a new {role} pod", lambda role=role, old=old: world.ready_names(role) - {old})
        assert world.ready_names(role) <= history.gated
    assert history.early == []


def test_a_settled_service_costs_no_writes(world: World) -> None:
    """The operators are back; once the service is Ready, pass after pass only reads."""
    world.kubectl("scale", f"deployment/{OPERATOR}", "-n", NAMESPACE, "--replicas=2")
    world.wait("two operators", lambda: len(world.ready_pods("operator")) == 2 and world.leader_pod())
    world.wait_rolled_out()
    world.wait_ready(prefill=1, decode=1, router=2)
    seen = passes(world)
    world.wait("a pass over the settled service", lambda: passes(world) >= seen + 2)
    seen, writes = passes(world), world.writes()
    world.wait("three more", lambda: passes(world) >= seen + 3)
    assert world.writes() == writes
