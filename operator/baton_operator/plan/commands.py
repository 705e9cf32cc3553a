"""Command lines inside the pods, ports, and paths. The one place that knows flags of the other rooms' programs."""

from __future__ import annotations

from baton_common.kube.objects import digest
from baton_operator.plan.blueprint import Blueprint, ModelSource, Pool, Tiers
from baton_operator.plan.labels import Component
from baton_operator.plan.names import child_name

GRPC_PORT = 9000
PEER_PORT = 9100
METRICS_PORT = 9090
HTTP_PORT = 8000
HTTP_PORT_NAME, GRPC_PORT_NAME, PEER_PORT_NAME, METRICS_PORT_NAME = "http", "grpc", "peer", "metrics"
ALIVE_SERVICE = ""
READY_SERVICE = "baton.v1.Worker"  # gRPC health: loaded and taking work

MODEL_FOLDER = "/models"
SETTINGS_FOLDER = "/etc/baton"
SETTINGS_FILE = "settings.yaml"
SCRATCH_FOLDER = "/tmp"  # the one writable folder of a read-only root file system

PAGES_VOLUME = "/kv"
PAGES_FOLDER = f"{PAGES_VOLUME}/pages"
"""Not the volume's root: a file system may have folders of its own there."""

_PAGES_PART = 0.9  # of a disk; the rest is for the file system, and for a page that is being written
_MIB = 1 << 20

KEYS_FOLDER = "/etc/baton-keys"
"""One file per API key: a mounted Secret, so that a changed key needs no restart."""

_PROGRAMS = {
    Component.PREFILL: "baton-prefill",
    Component.DECODE: "baton-decode",
    Component.COLOCATED: "baton-decode",
    Component.ROUTER: "baton-router",
}


def worker_command(plan: Blueprint, pool: Pool) -> list[str]:
    """`$(NAME)` is filled in by the kubelet from the container's environment.

    What a user typed is spelt `--flag=value`: it may begin with a dash.
    """
    command = [
        _PROGRAMS[pool.component], "--config", f"{SETTINGS_FOLDER}/{SETTINGS_FILE}",
        "--model", model_path(plan.model), f"--model-name={_literal(plan.served_name)}", "--role", pool.component.value,
        "--worker-id", "$(POD_NAME)", "--listen", f"0.0.0.0:{GRPC_PORT}", "--metrics-port", str(METRICS_PORT),
        "--drain-s", str(pool.drain_s), "--dump-dir", SCRATCH_FOLDER, "--peer-advertise", "$(POD_IP)",
    ]  # fmt: skip
    if pool.component is not Component.COLOCATED:  # that one is reached for what it lends to a store only
        command += ["--peer-listen", f"0.0.0.0:{PEER_PORT}"]
    if plan.tiers is not None:
        command.append(f"--tiers={tiers_text(plan.tiers, PAGES_FOLDER)}")
    return command


def tiers_text(tiers: Tiers, folder: str) -> str:
    """As the workers' setting has it. `folder`: for pages on disk, of one worker alone."""
    parts = [f"host={_size(tiers.host_bytes)}"]
    if tiers.disk_bytes:
        parts.append(f"file={folder}:{_size(int(tiers.disk_bytes * _PAGES_PART))}")
    if tiers.mooncake_master:
        parts.append(f"mooncake={tiers.mooncake_master}:{_size(tiers.mooncake_bytes)}")
    if tiers.session_bytes:
        parts.append(f"sessions={_size(tiers.session_bytes)}")
    return ",".join(parts)


def _size(size_bytes: int) -> str:
    """Rounded up to what can be read."""
    mib = -(-size_bytes // _MIB)
    if mib == 0:
        return "0"
    return f"{mib}MiB" if mib % 1024 else f"{mib // 1024}GiB"


def router_command(plan: Blueprint) -> list[str]:
    """Workers are found through the EndpointSlices of their headless Services."""
    services = ",".join(child_name(plan.name, pool.component.value) for pool in plan.workers)
    command = [
        _PROGRAMS[Component.ROUTER], "--config", f"{SETTINGS_FOLDER}/{SETTINGS_FILE}",
        "--model", model_path(plan.model), f"--served-name={_literal(plan.served_name)}",
        "--listen", f"0.0.0.0:{HTTP_PORT}", "--drain-s", str(plan.router.drain_s),
        "--worker-services", services,
    ]  # fmt: skip
    return [*command, "--api-keys-folder", KEYS_FOLDER] if plan.endpoint.api_keys_secret else command


def fetch_command(model: ModelSource, component: Component) -> list[str]:
    """Of the init container that downloads with resume and checksums; the router wants no weights."""
    command = ["baton-fetch", "--uri", _literal(model.uri), "--to", model_path(model)]
    if model.revision:
        command.append(f"--revision={model.revision}")
    if model.endpoint:
        command += ["--endpoint", _literal(model.endpoint)]
    return [*command, "--only-tokenizer"] if component is Component.ROUTER else command


def model_path(model: ModelSource) -> str:
    """Folder of the checkpoint inside the containers."""
    if not model.fetched:
        folder = _literal(model.folder.strip("/"))
        return f"{MODEL_FOLDER}/{folder}" if folder else MODEL_FOLDER
    # several services may share one cache claim
    return f"{MODEL_FOLDER}/{digest([model.uri, model.revision, model.endpoint], length=16)}"


def _literal(typed: str) -> str:
    """Keeps the kubelet from seeing a `$(NAME)` in it."""
    return typed.replace("$", "$$")
