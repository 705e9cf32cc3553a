"""InferenceService: what a user writes to have a model served, on a cluster or on one machine.

Only `spec.model.uri` is required. A pool that is not mentioned has one worker for prefill and decode; once `colocated`
is mentioned, none. Invariant: `parse` has checked the schema and every rule of the place; `model_validate` only the
schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from baton_operator.api.base import ApiVersion, ObjectName, Role, Strict
from baton_operator.api.cache import Cache
from baton_operator.api.metadata import Metadata, checked
from baton_operator.api.model import Model
from baton_operator.api.policy import Rollout, Slo, Tracing, Transport
from baton_operator.api.pool import Parallelism, Pool
from baton_operator.api.router import Router
from baton_operator.api.rules import Place, rule
from baton_operator.api.status import ServiceStatus


def _count(pool: str, unmentioned: str) -> str:
    """CEL for the fewest workers of a pool."""
    own = f"self.{pool}"
    return (
        f"(has({own}) ? (has({own}.minReplicas) ? {own}.minReplicas : has({own}.replicas) ? {own}.replicas : 1)"
        f" : {unmentioned})"
    )


_PREFILL = _count("prefill", "(has(self.colocated) ? 0 : 1)")
_DECODE = _count("decode", "(has(self.colocated) ? 0 : 1)")
_COLOCATED = _count("colocated", "0")
_POOLS = tuple(f"self.{role}" for role in Role)


class ServiceSpec(Strict):
    model: Model
    profile: Annotated[ObjectName, Field(description="the AcceleratorProfile of the workers")] = "cpu"
    parallelism: Parallelism = Field(default_factory=Parallelism)
    prefill: Annotated[Pool | None, Field(description="workers that compute prompts; 1, without colocated")] = None
    decode: Annotated[Pool | None, Field(description="workers that write answers; 1, without colocated")] = None
    colocated: Annotated[Pool | None, Field(description="workers that do both themselves; 0")] = None
    router: Router = Field(default_factory=Router)
    transport: Transport = Field(default_factory=Transport)
    cache: Annotated[Cache | None, Field(description="memory and disk for KV beyond the pool; absent = none")] = None
    rollout: Rollout = Field(default_factory=Rollout)
    slo: Slo | None = None
    tracing: Annotated[Tracing | None, Field(description="where spans of requests go; absent = nowhere")] = None

    @rule(
        cel=f"({_PREFILL} == 0) == ({_DECODE} == 0)",
        message="prefill and decode work in pairs: give both at least one of the replicas, "
        "or neither and use colocated",
    )
    def in_pairs(self) -> bool:
        return (self.pool(Role.PREFILL).least == 0) == (self.pool(Role.DECODE).least == 0)

    @rule(
        cel=f"{_PREFILL} + {_DECODE} + {_COLOCATED} > 0",
        message="no workers at all: give prefill and decode at least one of the replicas each, or use colocated",
    )
    def has_workers(self) -> bool:
        return any(self.pool(role).least for role in Role)

    @rule(
        cel=f"self.transport.wire != 'shm' || {_PREFILL} == 0", field="transport.wire",
        places=frozenset({Place.CLUSTER}),
        message="pods share no memory, so prefill cannot hand over by shm; use auto or tcp (shm works with baton up)",
    )  # fmt: skip
    def no_shared_memory_between_pods(self) -> bool:
        return self.transport.wire != "shm" or self.pool(Role.PREFILL).least == 0

    @rule(
        cel="self.profile != 'cpu' || (self.parallelism.tensor == 1 && "
        + " && ".join(f"(!has({own}) || !has({own}.parallelism) || {own}.parallelism.tensor == 1)" for own in _POOLS)
        + ")",
        field="profile",
        message="profile cpu has no GPUs to spread a worker over; choose a GPU profile or set parallelism.tensor to 1",
    )
    def gpus_to_spread_over(self) -> bool:
        written = [pool.parallelism for pool in (self.prefill, self.decode, self.colocated) if pool is not None]
        return self.profile != "cpu" or all(one is None or one.tensor == 1 for one in (self.parallelism, *written))

    def pool(self, role: Role) -> Pool:
        """The pool as it is meant when the user did not mention it."""
        written = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.COLOCATED: self.colocated}[role]
        if written is not None:
            return written
        return Pool(replicas=0 if role is Role.COLOCATED or self.colocated is not None else 1)

    def tensor(self, role: Role) -> int:
        """GPUs that share a layer of one worker of this role."""
        return (self.pool(role).parallelism or self.parallelism).tensor


class InferenceService(Strict):
    """One model behind one endpoint."""

    plural: ClassVar[str] = "inferenceservices"

    api_version: ApiVersion
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: ServiceSpec
    status: ServiceStatus | None = None

    @rule(
        cel="self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        message="metadata.name also names a Service: use at most 63 lower-case letters, digits and -, "
        "beginning with a letter and not ending with -",
    )
    def name_of_a_service(self) -> bool:
        return self.metadata.names_a_service

    @classmethod
    def parse(cls, written: Mapping[str, object], *, place: Place = Place.CLUSTER) -> Self:
        """From YAML or from the API server. Raises pydantic.ValidationError with every fault and its path."""
        return checked(cls, written, place)
