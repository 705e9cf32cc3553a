"""What `kubectl apply` is told: refused is what only the service itself can heal, warned of what may still come."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from support.operator_world import PLATFORM, FakeKube, Tree, World, profile_object, service_object

from baton_common.kube.errors import KubeError
from baton_operator.admission import Admission, Verdict
from baton_operator.kinds import ACCELERATOR_PROFILE, CLAIM, HTTP_ROUTE, INFERENCE_SERVICE, SECRET
from baton_operator.metrics import OperatorMetrics
from baton_operator.prerequisites import ClusterFacts

GPU = {"device": "cuda", "gpu": {"resource": "nvidia.com/gpu", "perNode": 4}}
IN_FLOAT32 = {"podTemplate": {"spec": {"containers": [{"name": "main", "args": ["--dtype", "float32"]}]}}}
IN_BFLOAT16 = {"podTemplate": {"spec": {"containers": [{"name": "main", "args": ["--dtype", "bfloat16"]}]}}}


class Gate:
    """Admission beside the operator of the same world."""

    def __init__(self) -> None:
        self.world = World()
        self.metrics = OperatorMetrics(CollectorRegistry())
        facts = ClusterFacts(platform=PLATFORM, served=frozenset())
        self.admission = Admission(FakeKube(self.world.server), facts=lambda: facts, reviews=self.metrics.reviews)

    async def apply(self, service: Tree, old: Tree | None = None) -> Verdict:
        return await self.admission.judge(service, old)

    def count(self, result: str) -> float:
        return self.metrics.reviews.labels(result)._value.get()


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def test_a_good_service_passes_in_silence(gate: Gate) -> None:
    assert await gate.apply(service_object()) == Verdict()
    assert gate.count("passed") == 1
    assert not gate.world.server.writes


async def test_an_autoscaled_pool_without_an_autoscaler_is_worth_no_word(gate: Gate) -> None:
    assert await gate.apply(service_object(prefill={"minReplicas": 1, "maxReplicas": 4})) == Verdict()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"profile": "bare", "parallelism": {"tensor": 2}}, "NotSupported"),
        ({"prefill": IN_FLOAT32, "decode": IN_BFLOAT16}, "KvMismatch"),
        ({"model": {"uri": "baton://demo", "kvDtype": "wrong"}}, "InvalidSpec"),
    ],
)
async def test_what_only_the_service_can_heal_is_refused_in_the_words_of_its_condition(
    gate: Gate, spec: dict[str, Any], reason: str
) -> None:
    service = service_object(**spec)
    verdict = await gate.apply(service)
    assert verdict.denial.startswith(f"{reason}: ")
    assert gate.count("denied") == 1
    gate.world.server.put(INFERENCE_SERVICE, service)
    await gate.world.settle()
    condition = gate.world.condition("Accepted")
    assert verdict.denial == f"{condition['reason']}: {condition['message']}"


async def test_a_profile_that_is_there_and_does_not_fit_refuses_the_service(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor parallelism is refused before sizes are looked at, in this release."""
    monkeypatch.setattr("baton_operator.prerequisites.unsupported", lambda spec: "")
    gate.world.server.put(ACCELERATOR_PROFILE, profile_object("four", **GPU))
    verdict = await gate.apply(service_object(profile="four", parallelism={"tensor": 8}))
    assert verdict.denial.startswith("Unplaceable: ")
    assert "at most 4" in verdict.denial
    assert await gate.apply(service_object(profile="four", parallelism={"tensor": 4})) == Verdict()


async def test_what_may_still_come_is_a_warning_each(gate: Gate) -> None:
    service = service_object(
        model={"uri": "hf://a/b", "credentialsSecret": "token", "cacheClaim": "cache"},
        router={"apiKeysSecret": "keys", "httpRoute": {"gateway": "public"}},
    )
    found = await gate.apply(service)
    assert found.denial == ""
    assert len(found.warnings) == 4
    for word, warning in zip(("token", "cache", "keys", "HTTPRoute"), found.warnings, strict=True):
        assert word in warning
        assert " or " in warning  # what to do about it
    for kind, name in ((SECRET, "token"), (SECRET, "keys"), (CLAIM, "cache")):
        gate.world.server.put(kind, {"metadata": {"name": name, "namespace": "ns"}})
    [left] = (await gate.apply(service)).warnings
    assert HTTP_ROUTE.kind in left
    assert gate.count("warned") == 2


async def test_a_profile_that_is_not_there_or_is_at_fault_itself_is_a_warning(gate: Gate) -> None:
    [absent] = (await gate.apply(service_object(profile="h200"))).warnings
    assert "no AcceleratorProfile h200" in absent
    assert "cpu" in absent
    gate.world.server.put(ACCELERATOR_PROFILE, profile_object("h200", device="abacus"))
    [broken] = (await gate.apply(service_object(profile="h200"))).warnings
    assert "AcceleratorProfile h200" in broken


async def test_a_service_that_is_bad_already_can_still_be_labelled_released_and_deleted(gate: Gate) -> None:
    bad = service_object(profile="bare", parallelism={"tensor": 2})
    labelled = {**bad, "metadata": {**bad["metadata"], "labels": {"a": "b"}, "finalizers": []}}
    assert await gate.apply(labelled, bad) == Verdict()
    going = {**bad, "metadata": {**bad["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    assert await gate.apply(going, service_object()) == Verdict()
    assert gate.world.server.calls == []  # not even looked at
    assert (await gate.apply(bad, service_object())).denial


async def test_what_goes_wrong_here_keeps_nobody_out(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    for error in (KubeError("the API server does not answer"), KeyError("a defect")):

        def fail(verb: str, path: str, error: Exception = error) -> None:
            raise error

        gate.world.server.before = fail
        with caplog.at_level(logging.WARNING):
            assert await gate.apply(service_object(profile="h200")) == Verdict()
    assert gate.count("unseen") == 2
    assert "let in unseen" in caplog.text
