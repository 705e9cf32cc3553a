"""One pool of workers: how many, over how many GPUs each, with which resources, and the escape hatch to the pod."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

from baton_operator.api.base import GROUP, AnnotationMap, Count, LabelMap, Quantity, Strict
from baton_operator.api.quantity import amount
from baton_operator.api.rules import rule

ResourceMap = Annotated[dict[str, Quantity], Field(max_length=16)]


class Parallelism(Strict):
    """How one worker is spread over GPUs. Their number is computed from this, never written by hand."""

    tensor: Annotated[int, Field(ge=1, le=64, description="GPUs that share each layer")] = 1

    @rule(
        cel="self.tensor in [1, 2, 4, 8, 16, 32, 64]", field="tensor",
        message="such a number of GPUs cannot share attention heads evenly; use 1, 2, 4, 8, 16, 32 or 64",
    )  # fmt: skip
    def splits_evenly(self) -> bool:
        return self.tensor & (self.tensor - 1) == 0


class Resources(Strict):
    """CPU, memory and the like of one container. GPUs and RDMA devices are computed."""

    requests: ResourceMap = Field(default_factory=dict)
    limits: ResourceMap = Field(default_factory=dict)

    @rule(
        cel="!(has(self.requests) && self.requests.exists(k, k.endsWith('/gpu'))) && "
        "!(has(self.limits) && self.limits.exists(k, k.endsWith('/gpu')))",
        message="GPUs are computed from parallelism and the profile; remove them here and set parallelism.tensor",
    )
    def no_gpus(self) -> bool:
        return not any(key.endswith("/gpu") for key in (*self.requests, *self.limits))

    @rule(
        cel="!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || "
        "quantity(string(self.requests[k])).compareTo(quantity(string(self.limits[k]))) <= 0)",
        message="a request is above its limit; raise the limit or lower the request",
    )
    def within_limits(self) -> bool:
        return all(amount(self.requests[key]) <= amount(self.limits[key]) for key in self.requests.keys() & self.limits)


class PodMetadata(Strict):
    labels: Annotated[LabelMap, Field(description="on top of the operator's own")] = Field(default_factory=dict)
    annotations: Annotated[AnnotationMap, Field(description="on top of the operator's own")] = Field(
        default_factory=dict
    )

    @rule(
        cel=f"!has(self.labels) || !self.labels.exists(k, k.startsWith('{GROUP}/'))", field="labels",
        message=f"labels that begin with {GROUP}/ belong to the operator; choose another prefix",
    )  # fmt: skip
    def leaves_our_labels(self) -> bool:
        return not any(key.startswith(f"{GROUP}/") for key in self.labels)


class PodTemplate(Strict):
    """Merged over the pod that the operator makes, lists by `name`; for what has no field of its own."""

    metadata: PodMetadata | None = None
    spec: Annotated[
        dict[str, JsonValue] | None,
        Field(
            description="part of a PodSpec; the server's container is called `main`",
            json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        ),
    ] = None


class Pool(Strict):
    """Workers of one role."""

    replicas: Annotated[Count | None, Field(description="fixed number of workers; default: 1")] = None
    min_replicas: Annotated[
        int | None, Field(ge=1, le=1024, description="fewest workers, when an autoscaler sets the number")
    ] = None
    max_replicas: Annotated[
        int | None, Field(ge=1, le=1024, description="most workers, when an autoscaler sets the number")
    ] = None
    parallelism: Annotated[Parallelism | None, Field(description="default: spec.parallelism")] = None
    resources: Annotated[
        Resources | None, Field(description="requests and limits of CPU, memory and the like; default: the profile's")
    ] = None
    pod_template: PodTemplate | None = None

    @rule(
        cel="!has(self.replicas) || !(has(self.minReplicas) || has(self.maxReplicas))", field="replicas",
        message="replicas fixes the number of workers, minReplicas and maxReplicas let it follow the load; "
        "remove replicas, or the other two",
    )  # fmt: skip
    def one_way_to_count(self) -> bool:
        return self.replicas is None or (self.min_replicas is None and self.max_replicas is None)

    @rule(
        cel="has(self.minReplicas) == has(self.maxReplicas)",
        message="minReplicas and maxReplicas go together; set both, or replicas alone",
    )
    def both_bounds(self) -> bool:
        return (self.min_replicas is None) == (self.max_replicas is None)

    @rule(
        cel="!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
        field="minReplicas",
        message="minReplicas is above maxReplicas; lower the one or raise the other",
    )
    def bounds_in_order(self) -> bool:
        return self.min_replicas is None or self.max_replicas is None or self.min_replicas <= self.max_replicas

    @property
    def autoscaled(self) -> bool:
        """True: the operator keeps the number within the bounds and otherwise leaves it alone."""
        return self.min_replicas is not None

    @property
    def least(self) -> int:
        """Workers that there must be: the fixed number or the lower bound."""
        if self.min_replicas is not None:
            return self.min_replicas
        return 1 if self.replicas is None else self.replicas

    @property
    def most(self) -> int:
        return self.least if self.max_replicas is None else self.max_replicas
