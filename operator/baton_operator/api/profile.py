"""AcceleratorProfile: what a kind of node offers, as data. Vendors differ here and nowhere else.

Cluster-scoped; services name one. Ships as `profiles/*.yaml`; a cluster may add its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from baton_operator.api.base import AnnotationMap, ApiVersion, LabelMap, ObjectName, Quantity, ResourceName, Strict
from baton_operator.api.metadata import Metadata, checked
from baton_operator.api.pool import Resources
from baton_operator.api.rules import Place, rule, transition

Device = Literal["cpu", "cuda", "rocm"]
LinuxCapability = Literal["IPC_LOCK", "NET_ADMIN", "NET_RAW", "SYS_NICE"]
EnvMap = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]


class Gpus(Strict):
    resource: Annotated[ResourceName, Field(description="like nvidia.com/gpu")]
    per_node: Annotated[int, Field(ge=1, le=64, description="GPUs of one node; no worker gets more")]


class Rdma(Strict):
    resource: Annotated[ResourceName, Field(description="like rdma/ib; every cluster names its own")]
    per_gpu: Annotated[int, Field(ge=1, le=16, description="devices that a worker asks for with each GPU")] = 1


class Toleration(Strict):
    key: Annotated[str | None, Field(max_length=317)] = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: Annotated[str | None, Field(max_length=63)] = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: Annotated[int | None, Field(ge=0)] = None

    @rule(
        cel="self.operator != 'Exists' || !has(self.value)", field="value",
        message="operator Exists takes any value; remove value, or use operator Equal",
    )  # fmt: skip
    def exists_has_no_value(self) -> bool:
        return self.operator != "Exists" or self.value is None

    @rule(
        cel="self.operator == 'Exists' || has(self.key)",
        message="a toleration without a key must have operator Exists; add the key of the taint",
    )
    def equal_has_a_key(self) -> bool:
        return self.operator == "Exists" or self.key is not None


class ProfileSpec(Strict):
    device: Annotated[Device, Field(description="what the engine computes on; also the flavour of its image")]
    arch: Annotated[Literal["amd64", "arm64"] | None, Field(description="of the nodes; absent = any")] = None
    gpu: Annotated[Gpus | None, Field(description="absent = the workers use no GPU")] = None
    rdma: Annotated[Rdma | None, Field(description="absent = KV travels over the pod network")] = None
    node_selector: Annotated[LabelMap, Field(description="labels of the nodes")] = Field(default_factory=dict)
    tolerations: Annotated[
        list[Toleration], Field(max_length=16, description="of the nodes' taints, as in a pod")
    ] = Field(default_factory=list)
    runtime_class_name: Annotated[ObjectName | None, Field(description="RuntimeClass of the workers")] = None
    env: Annotated[EnvMap, Field(description="environment of the workers")] = Field(default_factory=dict)
    linux_capabilities: Annotated[
        list[LinuxCapability],
        Field(max_length=8, description="added to the workers; anything here ends PSS restricted"),
    ] = Field(default_factory=list)
    pod_annotations: Annotated[AnnotationMap, Field(description="for network plugins")] = Field(default_factory=dict)
    worker_resources: Annotated[Resources, Field(description="of one worker, without GPUs")] = Field(
        default_factory=Resources
    )
    shared_memory: Annotated[Quantity | None, Field(description="size of /dev/shm; absent = the runtime's")] = None
    image_flavour: Annotated[
        str | None, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64, description="default: as device")
    ] = None

    @rule(
        cel="(self.device == 'cpu') == !has(self.gpu)",
        message="device {device} and gpu do not fit: remove gpu from a cpu profile, "
        "give gpu.resource and gpu.perNode to any other",
    )
    def gpu_fits_device(self) -> bool:
        return (self.device == "cpu") == (self.gpu is None)

    @rule(
        cel="!has(self.gpu) || !(self.device == 'rocm' && self.gpu.resource.startsWith('nvidia.com/')) && "
        "!(self.device == 'cuda' && self.gpu.resource.startsWith('amd.com/'))",
        field="gpu",
        message="gpu.resource is of another vendor than device {device}; "
        "use amd.com/gpu with rocm, nvidia.com/gpu with cuda",
    )
    def gpu_of_the_vendor(self) -> bool:
        foreign = {"rocm": "nvidia.com/", "cuda": "amd.com/"}.get(self.device)
        return self.gpu is None or foreign is None or not self.gpu.resource.startswith(foreign)

    @rule(
        cel="!has(self.rdma) || has(self.gpu)", field="rdma",
        message="rdma devices are counted per GPU, and this profile has none; remove rdma",
    )  # fmt: skip
    def rdma_beside_gpus(self) -> bool:
        return self.rdma is None or self.gpu is not None

    @transition(
        cel="self.device == oldSelf.device && (has(self.arch) ? self.arch : '') == "
        "(has(oldSelf.arch) ? oldSelf.arch : '')",
        message="device and arch cannot change under running services; make a new profile and set it in the services",
    )
    def same_kind_of_node(self, old: ProfileSpec) -> bool:
        return (self.device, self.arch) == (old.device, old.arch)


class AcceleratorProfile(Strict):
    plural: ClassVar[str] = "acceleratorprofiles"

    api_version: ApiVersion
    kind: Literal["AcceleratorProfile"]
    metadata: Metadata
    spec: ProfileSpec

    @classmethod
    def parse(cls, written: Mapping[str, object]) -> Self:
        """From YAML or from the API server. Raises pydantic.ValidationError with every fault and its path."""
        return checked(cls, written, Place.CLUSTER)
