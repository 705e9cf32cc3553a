"""Sixteen clients stream while pods come, go and are replaced. Nobody gets an error, a wrong or a short answer.

The service is the sample after one edit: see `conftest.edited`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from story.load import LONG, Load, ask, client
from story.watch import PodHistory, Truth
from story.world import ONE_THREAD, SERVICE, TEAM, World

MOST_DELETIONS = 5  # until a request is caught in the middle of its answer


@pytest.fixture(scope="module", autouse=True)
def truth(world: World, edited: None, url: str) -> Iterator[Truth]:
    """What `kubectl get isvc` claims, checked during all of it."""

    def serves() -> bool:
        try:
            with client(url) as asking:
                return bool(asking.models.list().data)
        except Exception:
            return False

    with Truth(cluster=world.place.cluster, serves=serves).watching() as found:
        yield found


def scale(world: World, role: str, count: int) -> None:
    """As `kubectl autoscale` or an HPA does it: by the scale of the Deployment."""
    world.kubectl("scale", f"deployment/{SERVICE}-{role}", "-n", TEAM, f"--replicas={count}")
    world.wait_ready(**{role: count})


def pod_of(world: World, role: str) -> str:
    return min(world.names(role))


def delete(world: World, role: str) -> str:
    name = pod_of(world, role)
    world.kubectl("delete", "pod", name, "-n", TEAM, "--wait=false")
    return name


def test_the_undisturbed_service_answers_everybody_alike(load: Load) -> None:
    """The yardstick of all that follows: alone or among sixteen, an answer is the same."""
    with load.undisturbed_by("nothing"):
        pass


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_scaling_up_and_down_costs_nobody_an_answer(world: World, load: Load, role: str) -> None:
    with load.undisturbed_by(f"{role} 1 -> 3"):
        scale(world, role, 3)
    for pod in world.pods(role):
        name = pod["metadata"]["name"]
        world.wait(f"work on {name}", lambda name=name: world.steps(name, role) > 0)
    with load.undisturbed_by(f"{role} 3 -> 1"):
        scale(world, role, 1)


@pytest.mark.parametrize("role", ["decode", "prefill", "router"])
def test_deleting_a_pod_costs_nobody_an_answer(world: World, load: Load, role: str) -> None:
    """The only one of its role, but for the router."""
    counts = {"prefill": 1, "decode": 1, "router": 2}
    with load.undisturbed_by(f"{role} pod deleted"):
        name = delete(world, role)
        world.wait(f"{name} is gone", lambda: not world.exists("pod", name))
        world.wait_ready(**counts)


def test_streams_move_when_their_decode_pod_is_deleted(world: World, load: Load) -> None:
    """With another one there nobody waits for its successor. How many move depends on what runs just then."""

    def moved() -> float:
        return world.total("router", "baton_router_migrations_total", outcome="moved")

    scale(world, "decode", 2)
    before = moved()
    with load.undisturbed_by("decode pods deleted, another one there"):
        for _ in range(MOST_DELETIONS):
            name = delete(world, "decode")
            world.wait(f"{name} is gone", lambda name=name: not world.exists("pod", name))
            world.wait_ready(decode=2)
            if moved() > before:
                break
    print(f"{moved() - before:.0f} requests moved")
    assert moved() > before
    scale(world, "decode", 1)


def test_a_new_prefill_pod_takes_back_what_decode_has(world: World, url: str) -> None:
    """It has computed nothing yet; the next turn begins with what the former one handed over."""
    opening, whole, salt = " ".join([LONG] * 2), " ".join([LONG] * 4), secrets.token_hex(8)
    expected = ask(url, whole)
    ask(url, opening, salt=salt)
    name = delete(world, "prefill")
    world.wait(f"{name} is gone", lambda: not world.exists("pod", name))
    world.wait_ready(prefill=1)
    before = world.total("prefill", "baton_kvtransfer_committed_total", direction="in")
    assert ask(url, whole, salt=salt) == expected
    assert world.total("prefill", "baton_kvtransfer_committed_total", direction="in") > before


def test_tiers_keep_what_was_computed(world: World) -> None:
    def kept(role: str, tier: str) -> bool:
        return world.total(role, "baton_tier_bytes_total", tier=tier, direction="in") > 0

    for role in ("prefill", "decode"):
        for tier in ("host", "file"):
            world.wait(f"pages of {role} in tier {tier}", lambda role=role, tier=tier: kept(role, tier))
        assert world.total(role, "baton_tier_off") == 0


def test_an_update_of_a_role_is_rolled_out_without_an_error(world: World, load: Load) -> None:
    before = world.names("decode")
    patch: dict[str, Any] = json.loads(json.dumps(ONE_THREAD))
    patch["metadata"] = {"annotations": {"note": "changed"}}
    with load.undisturbed_by("decode updated"):
        world.patch_service({"decode": {"podTemplate": patch}})
        world.wait_rolled_out()
        world.wait("old pods are gone", lambda: not before & world.all_names("decode"))
    assert world.names("decode")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_killed_costs_nobody_an_answer(
    world: World, load: Load, history: PodHistory, role: str
) -> None:
    """kill -9 in its container: the kubelet starts it again at the same address."""
    if world.place.node_pid is None:
        pytest.skip("the node is not ours to kill processes on")
    name = pod_of(world, role)
    with load.undisturbed_by(f"{role} killed"):
        world.kill_main(name)
        world.wait(f"{name} starts again", lambda: history.restarts.get(name, 0) >= 1)
        world.wait_ready(**{role: 1})


def test_get_isvc_told_the_truth_all_along(truth: Truth, history: PodHistory) -> None:
    print("\n" + "\n".join(truth.rows))
    assert truth.confirmed > 0
    assert truth.lies == []
    assert history.early == []
