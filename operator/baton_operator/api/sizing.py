"""What one worker asks of a node: GPUs from parallelism and profile, the rest from profile and overrides. Pure.

What the cache takes comes on top, of whatever profile and overrides say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton_common.errors import ConfigError
from baton_operator.api.base import Role
from baton_operator.api.cache import Cache
from baton_operator.api.pool import Resources
from baton_operator.api.profile import ProfileSpec
from baton_operator.api.quantity import amount_bytes, of_bytes
from baton_operator.api.service import ServiceSpec


class Unplaceable(ConfigError):
    """No node of the profile can hold such a worker; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSize:
    """Of one worker pod. `requests` and `limits` contain GPUs and RDMA devices."""

    gpus: int
    requests: Mapping[str, int | str]
    limits: Mapping[str, int | str]


def worker_size(spec: ServiceSpec, role: Role, profile: ProfileSpec, *, profile_name: str) -> WorkerSize:
    """Raises Unplaceable when parallelism and profile do not fit."""
    tensor = spec.tensor(role)
    if profile.gpu is None:
        if tensor > 1:
            raise Unplaceable(
                f"{role} wants tensor {tensor}, but profile {profile_name} has no GPUs; "
                "choose a GPU profile or set parallelism.tensor to 1",
                param="spec.parallelism.tensor",
            )
        devices: dict[str, int | str] = {}
    else:
        if tensor > profile.gpu.per_node:
            raise Unplaceable(
                f"{role} wants {tensor} GPUs, but a node of profile {profile_name} has {profile.gpu.per_node} and a "
                f"worker does not span nodes; set parallelism.tensor to at most {profile.gpu.per_node}",
                param="spec.parallelism.tensor",
            )
        devices = {profile.gpu.resource: tensor}
        if profile.rdma is not None:
            devices[profile.rdma.resource] = tensor * profile.rdma.per_gpu
    override = spec.pool(role).resources or Resources()
    base = profile.worker_resources
    requests, limits = {**base.requests, **override.requests}, {**base.limits, **override.limits}
    for resource, size_bytes in _cache_bytes(spec.cache).items():
        if resource in requests or resource not in limits:  # a limit alone is the request, too
            requests[resource] = _more(requests.get(resource, 0), size_bytes)
        if resource in limits:
            limits[resource] = _more(limits[resource], size_bytes)
    return WorkerSize(
        gpus=tensor if profile.gpu else 0, requests={**requests, **devices}, limits={**limits, **devices}
    )


def _cache_bytes(cache: Cache | None) -> Mapping[str, int]:
    """By resource. A volume of a StorageClass takes nothing of the node."""
    if cache is None:
        return {}
    lent = cache.mooncake.memory if cache.mooncake else None
    found = {"memory": amount_bytes(cache.host_memory) + amount_bytes(lent)}
    if cache.disk and not cache.disk.storage_class:
        found["ephemeral-storage"] = amount_bytes(cache.disk.size)
    return found


def _more(size: int | str, size_bytes: int) -> str:
    return of_bytes(amount_bytes(size) + size_bytes)
