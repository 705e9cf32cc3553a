"""GPUs and resources of a worker follow from parallelism, profile and overrides."""

from __future__ import annotations

from typing import Any

import pytest
from support.api_objects import service

from baton_operator.api import InferenceService, Role, Unplaceable, WorkerSize, worker_size
from baton_operator.shipped import FOLDER, shipped_profiles

PROFILES = shipped_profiles()


def size(name: str, spec: dict[str, Any], role: Role = Role.PREFILL) -> WorkerSize:
    wanted = InferenceService.parse(service({"profile": name, **spec})).spec
    return worker_size(wanted, role, PROFILES[name].spec, profile_name=name)


def test_the_shipped_profiles_are_named_like_their_files() -> None:
    assert set(PROFILES) == {file.stem for file in FOLDER.glob("*.yaml")} == {"cpu", "h200", "gb200", "mi355x"}


@pytest.mark.parametrize(
    ("name", "resource", "per_node"),
    [("h200", "nvidia.com/gpu", 8), ("gb200", "nvidia.com/gpu", 4), ("mi355x", "amd.com/gpu", 8)],
)
def test_gpus_are_computed_up_to_a_node_and_not_beyond(name: str, resource: str, per_node: int) -> None:
    for tensor in (1, 2, 4, 8, 16):
        spec = {"parallelism": {"tensor": tensor}}
        if tensor <= per_node:
            made = size(name, spec)
            assert made.gpus == made.requests[resource] == made.limits[resource] == tensor
        else:
            with pytest.raises(Unplaceable, match=f"at most {per_node}"):
                size(name, spec)


def test_a_role_may_have_a_parallelism_of_its_own() -> None:
    spec = {"parallelism": {"tensor": 2}, "decode": {"parallelism": {"tensor": 8}}}
    assert (size("h200", spec).gpus, size("h200", spec, Role.DECODE).gpus) == (2, 8)


def test_rdma_devices_come_with_each_gpu() -> None:
    changed = PROFILES["h200"].model_dump(by_alias=True, exclude_none=True)
    changed["spec"]["rdma"] = {"resource": "rdma/ib", "perGpu": 2}
    with_rdma = type(PROFILES["h200"]).parse(changed)
    spec = InferenceService.parse(service({"profile": "h200", "parallelism": {"tensor": 4}})).spec
    made = worker_size(spec, Role.DECODE, with_rdma.spec, profile_name="h200")
    assert made.limits["rdma/ib"] == made.requests["rdma/ib"] == 8


def test_an_override_replaces_only_what_it_names() -> None:
    made = size("cpu", {"prefill": {"resources": {"limits": {"memory": "20Gi"}}}})
    assert made.gpus == 0
    assert dict(made.requests) == {"cpu": "500m", "memory": "1Gi"}
    assert dict(made.limits) == {"memory": "20Gi"}
    assert size("cpu", {}, Role.DECODE).limits == {"memory": "4Gi"}


def test_a_worker_is_not_spread_over_gpus_that_a_profile_does_not_have() -> None:
    wanted = InferenceService.parse(service({"profile": "mine", "parallelism": {"tensor": 2}})).spec
    with pytest.raises(Unplaceable, match=r"profile mine has no GPUs; choose a GPU profile"):
        worker_size(wanted, Role.DECODE, PROFILES["cpu"].spec, profile_name="mine")


def test_the_cache_comes_on_top_of_what_a_worker_has() -> None:
    cache = {"hostMemory": "3Gi", "disk": {"size": "10Gi"}, "mooncake": {"master": "m:1", "memory": "512Mi"}}
    made = size("cpu", {"cache": cache})
    assert dict(made.requests) == {"cpu": "500m", "memory": "4608Mi", "ephemeral-storage": "10Gi"}
    assert dict(made.limits) == {"memory": "7680Mi"}
    both = {"requests": {"memory": "1G"}, "limits": {"ephemeral-storage": "1Gi"}}
    own = size("cpu", {"cache": cache, "prefill": {"resources": both}})
    assert own.requests["memory"] == str(10**9 + 3584 * 2**20)
    assert own.limits["ephemeral-storage"] == "11Gi"
    assert "ephemeral-storage" not in own.requests  # its limit is its request


def test_a_volume_of_its_own_takes_nothing_of_the_node() -> None:
    made = size("cpu", {"cache": {"hostMemory": "1Gi", "disk": {"size": "10Gi", "storageClass": "fast"}}})
    assert dict(made.requests) == {"cpu": "500m", "memory": "2Gi"}
