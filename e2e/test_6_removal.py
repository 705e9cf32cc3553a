"""Deleting the service and the release leaves what the page says, and nothing else."""

from __future__ import annotations

import pytest
from story.world import SERVICE, TEAM, World
from support.chart import NAMESPACE, RELEASE

GIVEN = {"configmaps/kube-root-ca.crt", "serviceaccounts/default"}  # in every namespace
PASSING = {"events", "events.events.k8s.io"}                        # what happened, kept for an hour


def contents(world: World, namespace: str) -> set[str]:
    """Everything of every kind that the API server can list."""
    kinds = world.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    found = set()
    for kind in kinds:
        if kind not in PASSING:
            lines = world.kubectl("get", kind, "-n", namespace, "-o", "name").splitlines()
            found |= {f"{kind.partition('.')[0]}/{line.rpartition('/')[2]}" for line in lines if "/" in line}
    return found - GIVEN


def assert_empties(world: World, namespace: str) -> None:
    """What garbage collection removes may take a while."""
    left: set[str] = set()

    def empty() -> bool:
        left.clear()
        left.update(contents(world, namespace))
        return not left

    try:
        world.wait("an empty namespace", empty, timeout_s=240)
    except AssertionError:
        assert left == set()


def test_deleting_the_service_leaves_nothing_of_it(world: World) -> None:
    world.kubectl("delete", "isvc", SERVICE, "-n", TEAM, "--timeout=120s")
    world.wait("no pods", lambda: not world.get("pods", "-n", TEAM)["items"])
    assert_empties(world, TEAM)


def test_removing_the_release_leaves_what_the_page_says(world: World) -> None:
    """CRDs and profiles stay (charts/baton/README.md); users may have made more of both."""
    world.helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "240s")
    assert_empties(world, NAMESPACE)
    selector = ("-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "name")
    kinds = "clusterroles,clusterrolebindings,validatingwebhookconfigurations,mutatingwebhookconfigurations"
    assert world.kubectl("get", kinds, *selector) == ""
    crds = world.kubectl("get", "crd", "-o", "name").split()
    assert {name for name in crds if "baton" in name} == {
        "customresourcedefinition.apiextensions.k8s.io/inferenceservices.serving.baton.dev",
        "customresourcedefinition.apiextensions.k8s.io/acceleratorprofiles.serving.baton.dev",
    }
    assert world.kubectl("get", "acceleratorprofiles", "-o", "name")


@pytest.mark.parametrize("namespace", [TEAM, NAMESPACE])
def test_namespaces_can_be_deleted(world: World, namespace: str) -> None:
    """No finaliser of ours holds them up."""
    world.kubectl("delete", "namespace", namespace, "--timeout=120s")
