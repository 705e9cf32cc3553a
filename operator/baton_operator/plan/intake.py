"""From what a user declared, the accelerator profile and the operator's settings to a blueprint. Pure.

The one place that reads the API's models for planning: defaults are filled in, GPUs counted, drain times derived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from baton_common.kube.objects import Json, Object
from baton_operator.api import (
    DEMO_URI,
    AcceleratorProfile,
    Cache,
    InferenceService,
    Model,
    Router,
    ServiceSpec,
    worker_size,
)
from baton_operator.api import Pool as DeclaredPool
from baton_operator.api import Role as DeclaredRole
from baton_operator.api.pool import PodTemplate
from baton_operator.api.quantity import amount_bytes
from baton_operator.plan.blueprint import Blueprint, Endpoint, ModelSource, Pool, Scale, Scheme, Tiers
from baton_operator.plan.commands import HTTP_PORT_NAME
from baton_operator.plan.labels import Component
from baton_operator.plan.names import child_name

_ITL_BOUND_MS = 50       # slowest pace between tokens that a drain waits for, where no SLO says otherwise
_CONTEXT_TOKENS = 8192   # length of an answer that a drain waits for, where the context is not declared
_DRAIN_S = (30, 3600)    # shortest and longest drain of a worker that writes answers
_WORKER_WAIT_S = 60      # a deleted pod's successor is on its way: new and started answers wait for it
_PREFILL_DRAIN_S = 60    # a prompt that runs, and its handoff
_OWN_PORTS = ("nixl", "mooncake")
_ROUTER_REQUESTS: Mapping[str, int | str] = {"cpu": "500m", "memory": "512Mi"}
_ROUTER_LIMITS: Mapping[str, int | str] = {"memory": "2Gi"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What the operator itself brings to every service. `worker_image` may contain {flavour}."""

    router_image: str
    worker_image: str
    pull_secrets: tuple[str, ...] = ()
    api_servers: tuple[tuple[str, int], ...] = ()


def blueprint(service: InferenceService, profile: AcceleratorProfile, platform: Platform) -> Blueprint:
    """Raises Unplaceable when parallelism and profile do not fit."""
    spec = service.spec
    roles = ((Component(role.value), role) for role in DeclaredRole)
    workers = tuple(
        _worker_pool(service, component, role, profile, platform) for component, role in roles if _has_pods(spec, role)
    )
    return Blueprint(
        name=service.metadata.name,
        namespace=service.metadata.namespace or "default",
        uid=service.metadata.uid or "",
        model=_model(spec.model),
        served_name=spec.model.name,
        settings=_settings(spec, profile),
        kv_identity=_kv_identity(spec),
        workers=workers,
        router=_router_pool(spec, platform, profile.spec.arch),
        endpoint=_endpoint(service),
        max_surge=spec.rollout.max_surge,
        max_unavailable=spec.rollout.max_unavailable,
        tiers=tiers(spec.cache),
        any_peer_port=_any_peer_port(spec, profile),
        collector=spec.tracing.endpoint if spec.tracing else "",
        pull_secrets=platform.pull_secrets,
        api_servers=platform.api_servers,
    )


def drain_s(spec: ServiceSpec, component: Component) -> int:
    """Longest answer times slowest pace, so that a drain can finish what it has begun."""
    if component is Component.PREFILL:
        return _PREFILL_DRAIN_S
    pace_ms = _ITL_BOUND_MS if spec.slo is None or spec.slo.itl_ms is None else spec.slo.itl_ms
    tokens = spec.model.context_tokens or _CONTEXT_TOKENS
    least, most = _DRAIN_S
    return min(most, max(least, math.ceil(tokens * pace_ms / 1000)))


def tiers(cache: Cache | None) -> Tiers | None:
    """None: KV lives in the pools of the workers alone."""
    if cache is None or cache.host_memory is None:
        return None
    disk, store, sessions = cache.disk, cache.mooncake, cache.sessions
    return Tiers(
        host_bytes=amount_bytes(cache.host_memory),
        disk_bytes=amount_bytes(disk.size) if disk else 0,
        disk_class=(disk.storage_class or "") if disk else "",
        mooncake_master=store.master if store else "",
        mooncake_bytes=amount_bytes(store.memory) if store else 0,
        session_bytes=amount_bytes(sessions.quota) if sessions else 0,
    )


def _any_peer_port(spec: ServiceSpec, profile: AcceleratorProfile) -> bool:
    """NIXL's UCX and Mooncake listen where they like; `auto` may come to NIXL where there is RDMA."""
    wire = spec.transport.wire
    return wire in _OWN_PORTS or (wire == "auto" and profile.spec.rdma is not None)


def _has_pods(spec: ServiceSpec, role: DeclaredRole) -> bool:
    """A pool that is written down exists even with no replicas: it can be scaled up without a change of its kind."""
    written = {"prefill": spec.prefill, "decode": spec.decode, "colocated": spec.colocated}[role.value]
    return written is not None or spec.pool(role).most > 0


def _worker_pool(
    service: InferenceService, component: Component, role: DeclaredRole, profile: AcceleratorProfile, platform: Platform
) -> Pool:
    spec, hardware = service.spec, profile.spec
    declared = spec.pool(role)
    size = worker_size(spec, role, hardware, profile_name=profile.metadata.name)
    arch = {"kubernetes.io/arch": hardware.arch} if hardware.arch else {}
    return Pool(
        component=component,
        scale=_scale(declared),
        image=platform.worker_image.replace("{flavour}", hardware.image_flavour or hardware.device),
        drain_s=drain_s(spec, component),
        requests=size.requests,
        limits=size.limits,
        environment=hardware.env,
        node_selector={**arch, **hardware.node_selector},
        tolerations=tuple(item.model_dump(by_alias=True, exclude_none=True) for item in hardware.tolerations),
        runtime_class=hardware.runtime_class_name or "",
        linux_capabilities=tuple(hardware.linux_capabilities),
        annotations=hardware.pod_annotations,
        shared_memory="" if hardware.shared_memory is None else str(hardware.shared_memory),
        patch=_patch(declared.pod_template),
    )


def _scale(declared: DeclaredPool) -> Scale:
    fixed = None if declared.autoscaled else declared.least
    return Scale(fixed=fixed, least=declared.least, most=declared.most)


def _router_pool(spec: ServiceSpec, platform: Platform, arch: str | None) -> Pool:
    router = spec.router
    resources = router.resources
    return Pool(
        component=Component.ROUTER,
        scale=Scale(fixed=router.replicas, least=router.replicas, most=router.replicas),
        image=platform.router_image,
        drain_s=drain_s(spec, Component.ROUTER),
        requests={**_ROUTER_REQUESTS, **(resources.requests if resources else {})},
        limits={**_ROUTER_LIMITS, **(resources.limits if resources else {})},
        patch=_patch(router.pod_template),
    )


def _patch(template: PodTemplate | None) -> Object:
    return {} if template is None else template.model_dump(by_alias=True, exclude_none=True)


def _model(model: Model) -> ModelSource:
    scheme_text, _, rest = model.uri.partition("://")
    scheme = Scheme.DEMO if model.uri == DEMO_URI else Scheme(scheme_text)
    claim, _, folder = rest.partition("/") if scheme is Scheme.CLAIM else ("", "", "")
    return ModelSource(
        scheme=scheme, uri=model.uri, claim=claim, folder=folder, revision=model.revision or "",
        endpoint=model.endpoint or "", secret=model.credentials_secret or "", cache_claim=model.cache_claim or "",
    )  # fmt: skip


def _settings(spec: ServiceSpec, profile: AcceleratorProfile) -> Mapping[str, Mapping[str, Json]]:
    model, device = spec.model, profile.spec.device
    engine: dict[str, Json] = {"dtype": model.dtype, "kv_dtype": model.kv_dtype}
    if model.context_tokens is not None:
        engine["context_tokens"] = model.context_tokens
    traced: dict[str, Json] = {"otlp_endpoint": spec.tracing.endpoint} if spec.tracing else {}
    return {
        # torch calls AMD's devices cuda too
        "worker": {"device": "cuda" if device == "rocm" else device, "log_style": "json", **traced},
        "engine": engine,
        "transfer": {"wire": spec.transport.wire},
        "router": {"log_style": "json", "worker_wait_s": _WORKER_WAIT_S, "resume_wait_s": _WORKER_WAIT_S, **traced},
    }


def _kv_identity(spec: ServiceSpec) -> Mapping[str, Json]:
    model = spec.model
    return {"uri": model.uri, "revision": model.revision, "dtype": model.dtype}


def _endpoint(service: InferenceService) -> Endpoint:
    router, name = service.spec.router, child_name(service.metadata.name)
    return Endpoint(
        port=router.port,
        service_type=router.service.type,
        annotations=router.service.annotations,
        api_keys_secret=router.api_keys_secret or "",
        tls_secret=(router.ingress.tls_secret or "") if router.ingress else "",
        ingress=_ingress(router, name),
        ingress_annotations=router.ingress.annotations if router.ingress else {},
        http_route=_http_route(router),
        public_url=_public_url(router),
    )


def _ingress(router: Router, name: str) -> Object:
    if router.ingress is None:
        return {}
    backend: Json = {"service": {"name": name, "port": {"name": HTTP_PORT_NAME}}}
    path: Json = {"path": "/", "pathType": "Prefix", "backend": backend}
    spec: dict[str, Json] = {"rules": [{"host": router.ingress.host, "http": {"paths": [path]}}]}
    if router.ingress.class_name:
        spec["ingressClassName"] = router.ingress.class_name
    if router.ingress.tls_secret:
        spec["tls"] = [{"hosts": [router.ingress.host], "secretName": router.ingress.tls_secret}]
    return spec


def _http_route(router: Router) -> Object:
    route = router.http_route
    if route is None:
        return {}
    parent: dict[str, Json] = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": route.gateway}
    if route.gateway_namespace:
        parent["namespace"] = route.gateway_namespace
    if route.section_name:
        parent["sectionName"] = route.section_name
    return {"parentRefs": [parent], **({"hostnames": list(route.hostnames)} if route.hostnames else {})}


def _public_url(router: Router) -> str:
    if router.ingress is not None:
        return f"{'https' if router.ingress.tls_secret else 'http'}://{router.ingress.host}"
    if router.http_route is not None and router.http_route.hostnames:
        return f"http://{router.http_route.hostnames[0]}"
    return ""
