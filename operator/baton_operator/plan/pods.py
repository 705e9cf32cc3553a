"""Pod templates of workers and router. Pods pass the Pod Security Standard *restricted* unless a patch undoes that.

Probes tell progress: gRPC health of a worker is false when it has work and takes no step. Its port opens before the
model is loaded, and it is ready when that is done: loading may take as long as it wants.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.objects import Json, Object, digest, mapping
from baton_operator.api.quantity import of_bytes
from baton_operator.plan import commands
from baton_operator.plan.blueprint import Blueprint, Pool, Tiers
from baton_operator.plan.labels import (
    KV_REVISION_LABEL,
    REVISION_LABEL,
    SERVICE_ANNOTATION,
    SETTINGS_ANNOTATION,
    Component,
    role_labels,
    role_selector,
)
from baton_operator.plan.names import child_name
from baton_operator.plan.patch import merged
from baton_operator.plan.settings import settings_text

MAIN_CONTAINER = "main"  # patches name it
FETCH_CONTAINER = "fetch-model"
PAGES_VOLUME = "kv-pages"  # patches name it, too
USER_ID = 65532
_GRACE_S = 10  # after the drain: closing sockets, writing the last lines
_ENDPOINTS_LAG_S = 5  # until every proxy has taken a stopping router out of the Service


def pod_template(plan: Blueprint, pool: Pool) -> Object:
    """Complete, with the labels that name its revision."""
    base: Object = {
        "metadata": {
            "labels": role_labels(plan.name, pool.component),
            "annotations": {
                SERVICE_ANNOTATION: plan.name,
                SETTINGS_ANNOTATION: digest(settings_text(plan)),
                **pool.annotations,
            },
        },
        "spec": _spec(plan, pool),
    }
    patched = merged(base, pool.patch)
    revision = {REVISION_LABEL: digest(patched)}
    if pool.component is not Component.ROUTER:
        revision[KV_REVISION_LABEL] = digest(plan.kv_identity)
    # selectors and counts rely on these, whatever the patch says
    fixed = {**role_selector(plan.name, pool.component), **revision}
    return merged(patched, {"metadata": {"labels": fixed, "annotations": {SERVICE_ANNOTATION: plan.name}}})


def revision_of(template: Object) -> str:
    """Digest of everything in the template: pods with another revision are to be replaced."""
    value = mapping(template, "metadata", "labels").get(REVISION_LABEL)
    return value if isinstance(value, str) else ""


def grace_s(pool: Pool) -> int:
    lag_s = _ENDPOINTS_LAG_S if pool.component is Component.ROUTER else 0
    return pool.drain_s + lag_s + _GRACE_S


def _spec(plan: Blueprint, pool: Pool) -> dict[str, Json]:
    is_router = pool.component is Component.ROUTER
    spec: dict[str, Json] = {
        "serviceAccountName": child_name(plan.name, "router" if is_router else "worker"),
        "automountServiceAccountToken": is_router,
        "enableServiceLinks": False,
        # as process 1 a program that is still importing would be deaf to SIGTERM and cost the whole grace period
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": grace_s(pool),
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_main(plan, pool)],
        "volumes": _volumes(plan, pool),
        "topologySpreadConstraints": [{
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": role_selector(plan.name, pool.component)},
        }],
    }  # fmt: skip
    if gates := _gates(pool):
        spec["readinessGates"] = gates
    if plan.model.fetched:
        spec["initContainers"] = [_fetch(plan, pool)]
    if pool.node_selector:
        spec["nodeSelector"] = dict(pool.node_selector)
    if pool.tolerations:
        spec["tolerations"] = list(pool.tolerations)
    if pool.runtime_class:
        spec["runtimeClassName"] = pool.runtime_class
    if plan.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in plan.pull_secrets]
    return spec


def _gates(pool: Pool) -> list[Json]:
    """What a router has to say of a worker before its pod is Ready."""
    both = (REGISTERED_GATE, TRANSPORT_GATE)
    kinds = {Component.PREFILL: both, Component.DECODE: both, Component.COLOCATED: (REGISTERED_GATE,)}
    return [{"conditionType": kind} for kind in kinds.get(pool.component, ())]


def _main(plan: Blueprint, pool: Pool) -> Object:
    is_router = pool.component is Component.ROUTER
    container: dict[str, Json] = {
        "name": MAIN_CONTAINER,
        "image": pool.image,
        "imagePullPolicy": "IfNotPresent",
        "command": commands.router_command(plan) if is_router else commands.worker_command(plan, pool),
        "env": _environment(pool),
        "ports": _ports(pool),
        "resources": {"requests": _amounts(pool.requests), "limits": _amounts(pool.limits)},
        "securityContext": _container_security(pool.linux_capabilities),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(plan, pool),
        **(_router_probes() if is_router else _worker_probes()),
    }
    if is_router:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": _ENDPOINTS_LAG_S}}}
    return container


def _fetch(plan: Blueprint, pool: Pool) -> Object:
    container: dict[str, Json] = {
        "name": FETCH_CONTAINER,
        "image": pool.image,
        "imagePullPolicy": "IfNotPresent",
        "command": commands.fetch_command(plan.model, pool.component),
        "env": [_value("HOME", commands.SCRATCH_FOLDER)],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
        "securityContext": _container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [_mount("model", commands.MODEL_FOLDER), _mount("scratch", commands.SCRATCH_FOLDER)],
    }
    if plan.model.secret:
        container["envFrom"] = [{"secretRef": {"name": plan.model.secret}}]
    return container


def _container_security(added: tuple[str, ...] = ()) -> Object:
    capabilities: dict[str, Json] = {"drop": ["ALL"]}
    if added:
        capabilities["add"] = list(added)
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": capabilities,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _amounts(resources: Mapping[str, int | str]) -> Object:
    """As strings: the form in which the API server keeps them."""
    return {name: str(value) for name, value in sorted(resources.items())}


def _value(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def _from_pod(name: str, field: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": field}}}


def _environment(pool: Pool) -> list[Json]:
    return [
        _from_pod("POD_NAME", "metadata.name"),
        _from_pod("POD_NAMESPACE", "metadata.namespace"),
        _from_pod("POD_IP", "status.podIP"),
        _value("HOME", commands.SCRATCH_FOLDER),
        *(_value(name, value) for name, value in sorted(pool.environment.items())),
    ]


def _ports(pool: Pool) -> list[Json]:
    if pool.component is Component.ROUTER:
        ports = {commands.HTTP_PORT_NAME: commands.HTTP_PORT}
    else:
        ports = {commands.GRPC_PORT_NAME: commands.GRPC_PORT, commands.METRICS_PORT_NAME: commands.METRICS_PORT}
        if pool.component is not Component.COLOCATED:
            ports[commands.PEER_PORT_NAME] = commands.PEER_PORT
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def _worker_probes() -> dict[str, Json]:
    def probe(service: str, **times: int) -> Object:
        return {"grpc": {"port": commands.GRPC_PORT, "service": service}, "timeoutSeconds": 2, **times}

    return {
        "startupProbe": probe(commands.ALIVE_SERVICE, periodSeconds=2, failureThreshold=150),
        "readinessProbe": probe(commands.READY_SERVICE, periodSeconds=2, failureThreshold=2),
        "livenessProbe": probe(commands.ALIVE_SERVICE, periodSeconds=10, failureThreshold=3),
    }


def _router_probes() -> dict[str, Json]:
    def probe(path: str, **times: int) -> Object:
        return {"httpGet": {"path": path, "port": commands.HTTP_PORT_NAME}, "timeoutSeconds": 2, **times}

    return {
        "startupProbe": probe("/health", periodSeconds=1, failureThreshold=120),
        # All routers see the same workers: with none in the Service, requests that could wait for one are refused.
        "readinessProbe": probe("/ready", periodSeconds=2, failureThreshold=30),
        "livenessProbe": probe("/health", periodSeconds=10, failureThreshold=3),
    }


def _mount(name: str, path: str, *, read_only: bool = False) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True} if read_only else {"name": name, "mountPath": path}


def _mounts(plan: Blueprint, pool: Pool) -> list[Json]:
    mounts: list[Json] = [
        _mount("model", commands.MODEL_FOLDER, read_only=True),
        _mount("scratch", commands.SCRATCH_FOLDER),
        _mount("settings", commands.SETTINGS_FOLDER, read_only=True),
    ]
    if pool.shared_memory:
        mounts.append(_mount("shared-memory", "/dev/shm"))
    if _has_disk(plan, pool):
        mounts.append(_mount(PAGES_VOLUME, commands.PAGES_VOLUME))
    if _has_keys(plan, pool):
        mounts.append(_mount("api-keys", commands.KEYS_FOLDER, read_only=True))
    return mounts


def _volumes(plan: Blueprint, pool: Pool) -> list[Json]:
    volumes: list[Json] = [
        {"name": "model", **_model_volume(plan)},
        {"name": "scratch", "emptyDir": {}},
        {"name": "settings", "configMap": {"name": child_name(plan.name, "settings")}},
    ]
    if pool.shared_memory:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pool.shared_memory}})
    if plan.tiers is not None and _has_disk(plan, pool):
        volumes.append({"name": PAGES_VOLUME, **_pages_volume(plan.tiers)})
    if _has_keys(plan, pool):
        volumes.append({"name": "api-keys", "secret": {"secretName": plan.endpoint.api_keys_secret}})
    return volumes


def _has_disk(plan: Blueprint, pool: Pool) -> bool:
    return pool.component is not Component.ROUTER and plan.tiers is not None and plan.tiers.disk_bytes > 0


def _pages_volume(tiers: Tiers) -> Object:
    """One per pod: a worker shares its folder with nobody, and a pod that is gone leaves nothing behind."""
    size = of_bytes(tiers.disk_bytes)
    if not tiers.disk_class:
        return {"emptyDir": {"sizeLimit": size}}
    claim: Json = {
        "accessModes": ["ReadWriteOnce"], "storageClassName": tiers.disk_class,
        "resources": {"requests": {"storage": size}},
    }  # fmt: skip
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _has_keys(plan: Blueprint, pool: Pool) -> bool:
    return pool.component is Component.ROUTER and bool(plan.endpoint.api_keys_secret)


def _model_volume(plan: Blueprint) -> Object:
    model = plan.model
    if not model.fetched:
        return {"persistentVolumeClaim": {"claimName": model.claim, "readOnly": True}}
    if model.cache_claim:
        return {"persistentVolumeClaim": {"claimName": model.cache_claim}}
    return {"emptyDir": {}}
