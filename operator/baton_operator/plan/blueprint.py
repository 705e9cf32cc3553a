"""Everything that decides how a service's objects look, resolved: no defaults, options or look-ups are left.

`intake.py` makes it from the declared service, its accelerator profile and what the cluster offers; the other files of
this folder turn it into objects. Frozen: the same blueprint always gives the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from baton_common.kube.objects import Json, Object
from baton_operator.plan.labels import Component


class Scheme(StrEnum):
    """Where a checkpoint comes from."""

    HUB = "hf"
    CLAIM = "pvc"
    STORE = "s3"
    DEMO = "baton"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A checkpoint. `claim` and `folder` are of a pvc:// uri."""

    scheme: Scheme
    uri: str
    claim: str = ""
    folder: str = ""
    revision: str = ""
    endpoint: str = ""     # server to fetch from, a URL; empty = the public one
    secret: str = ""       # its keys become environment variables of the fetching container
    cache_claim: str = ""  # keeps downloads; empty = each pod downloads for itself

    @property
    def fetched(self) -> bool:
        """Has to be brought into a volume before the program starts."""
        return self.scheme is not Scheme.CLAIM

    @property
    def downloaded(self) -> bool:
        """Comes over the network."""
        return self.scheme in (Scheme.HUB, Scheme.STORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`fixed` pods; None: an autoscaler decides between `least` and `most`, and we leave the number alone."""

    fixed: int | None
    least: int
    most: int

    @property
    def first(self) -> int:
        """How many pods to begin with."""
        return self.least if self.fixed is None else self.fixed

    def clamp(self, replicas: int) -> int:
        return min(self.most, max(self.least, replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Where each worker keeps KV beyond its pool. 0 and empty = nothing there."""

    host_bytes: int
    disk_bytes: int = 0
    disk_class: str = ""       # StorageClass of a volume per pod; empty = the node's own disk
    mooncake_master: str = ""  # host:port
    mooncake_bytes: int = 0    # memory lent to the store
    session_bytes: int = 0     # quota of one tenant; 0 = the workers' default

    @property
    def mooncake_port(self) -> int:
        return int(self.mooncake_master.rpartition(":")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Pods of one component."""

    component: Component
    scale: Scale
    image: str
    drain_s: int  # how long running requests get after SIGTERM
    requests: Mapping[str, int | str] = field(default_factory=dict)
    limits: Mapping[str, int | str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Object, ...] = ()
    runtime_class: str = ""
    linux_capabilities: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    shared_memory: str = ""  # size of /dev/shm, a quantity; empty = the runtime's
    patch: Object = field(default_factory=dict)  # the user's change of the pod template


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How clients reach the router."""

    port: int
    service_type: str = "ClusterIP"
    annotations: Mapping[str, str] = field(default_factory=dict)
    api_keys_secret: str = ""
    tls_secret: str = ""                              # of the Ingress
    ingress: Object = field(default_factory=dict)     # spec of an Ingress; empty = none
    ingress_annotations: Mapping[str, str] = field(default_factory=dict)
    http_route: Object = field(default_factory=dict)  # spec of an HTTPRoute without rules; empty = none
    public_url: str = ""                              # as those make it reachable; empty = only in the cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    name: str
    namespace: str
    uid: str
    model: ModelSource
    served_name: str
    settings: Mapping[str, Mapping[str, Json]]   # by section, as in a settings file; what is absent keeps its default
    kv_identity: Mapping[str, Json]              # workers that differ here cannot hand KV to each other
    workers: tuple[Pool, ...]                    # only components that may have pods
    router: Pool
    endpoint: Endpoint
    max_surge: int | str
    max_unavailable: int | str
    tiers: Tiers | None = None                      # of every worker
    any_peer_port: bool = False                     # KV goes by a library that picks its ports itself
    collector: str = ""                             # of spans, a URL; empty = no spans
    pull_secrets: tuple[str, ...] = ()
    api_servers: tuple[tuple[str, int], ...] = ()   # (address, port) behind `kubernetes`: what the router watches

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (*self.workers, self.router)

    def pool(self, component: Component) -> Pool | None:
        return next((pool for pool in self.pools if pool.component is component), None)
