"""One cluster, one release, one service for the whole story; the files play in the order of their names.

When a step fails, what the cluster looks like is printed once, and the later steps are skipped: they go on from it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from story.load import Load, questions
from story.network import Connections
from story.place import place, why_not
from story.prometheus import Prometheus
from story.watch import PodHistory
from story.world import SCALABLE, SMALL, TEAM, TIERS, World
from support.chart import NAMESPACE

os.environ.setdefault("OMP_NUM_THREADS", "1")
_failed: list[str] = []
_worlds: list[World] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.timeout(600))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed:
        _failed.append(item.nodeid)
        if len(_failed) == 1 and _worlds:
            report.sections.append(("the cluster", _worlds[0].report()))
    return report


@pytest.fixture(autouse=True)
def _in_order() -> None:
    if _failed:
        pytest.skip(f"goes on from {_failed[0]}, which failed")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with place() as found:
        print(f"\ne2e on {found.said}", flush=True)
        made = World(place=found)
        for name in (NAMESPACE, TEAM):
            label = {"pod-security.kubernetes.io/enforce": "restricted"}
            made.kubectl("apply", "-f", "-", stdin=json.dumps({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": label},
            }))  # fmt: skip
        _worlds.append(made)
        yield made


@pytest.fixture(scope="session")
def history(world: World) -> Iterator[PodHistory]:
    with PodHistory(cluster=world.place.cluster).following() as found:
        yield found


@pytest.fixture(scope="session")
def connections(world: World, history: PodHistory) -> Iterator[Connections]:
    with Connections(place=world.place, history=history).recording() as found:
        yield found


@pytest.fixture(scope="session")
def prometheus(history: PodHistory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """None where the program is not installed."""
    with Prometheus.running(history, tmp_path_factory.mktemp("prometheus")) as found:
        yield found


@pytest.fixture(scope="session")
def url(world: World) -> Iterator[str]:
    """Of the Service; asked for once there is one."""
    with ExitStack() as stack:
        world.url = stack.enter_context(world.way_in())
        yield world.url


@pytest.fixture(scope="session")
def edited(world: World, history: PodHistory, prometheus: Prometheus | None) -> None:
    """The sample, so that an autoscaler's numbers are free to change, answers do not depend on who computes beside whom
    (float32), there are two routers, and KV is kept in memory and on disk.
    """
    began_s = time.monotonic()
    world.patch_service({
        "model": {"dtype": "float32"}, "prefill": SCALABLE, "decode": SCALABLE,
        "router": {"replicas": 2, "resources": SMALL}, "cache": TIERS,
    })  # fmt: skip
    world.wait_rolled_out()
    world.wait_ready(prefill=1, decode=1, router=2)
    print(f"\nthe edit is rolled out after {time.monotonic() - began_s:.0f} s", flush=True)


@pytest.fixture(scope="session")
def load(edited: None, url: str) -> Load:
    """With the answers of the undisturbed service: each question asked alone."""
    return Load.of(url, questions())
