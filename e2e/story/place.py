"""Where the story plays: the cluster of KUBECONFIG, else the test cluster kit, else kind. Says which.

A given cluster must be able to pull the images: E2E_VALUES is a file of Helm values that names them. The kit gets the
images of tools/make_images.py, kind those of the Dockerfiles. Does not know what is installed there afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support import cluster
from support.chart import ROOT, tool

INDEX = 4  # other cluster tests may run beside these
CACHE = Path.home() / ".cache/baton"
STATE = CACHE / "e2e-cluster"
KIND_NAME = "baton-e2e"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """`node_pid`: process 1 of the kit's node, in whose network all pods live; None elsewhere."""

    said: str
    cluster: cluster.Cluster
    values: dict[str, Any]
    node_pid: int | None = None


def why_not() -> str:
    """Reason to skip everything; empty = there is a cluster."""
    if given := os.environ.get("KUBECONFIG"):
        return "" if Path(given).is_file() and shutil.which("kubectl") and shutil.which("helm") else (
            "KUBECONFIG is set, but the file, kubectl or helm is missing"
        )  # fmt: skip
    if cluster.kit() is not None:
        return cluster.why_no_node() or ("" if shutil.which("mmdebstrap") else "the images' base needs mmdebstrap")
    if shutil.which("kind") and shutil.which("docker"):
        return "" if shutil.which("kubectl") and shutil.which("helm") else "kind is here, kubectl or helm is not"
    return "no cluster: set KUBECONFIG and E2E_VALUES, or have the test cluster kit, or kind with Docker"


@contextmanager
def place() -> Iterator[Place]:
    if given := os.environ.get("KUBECONFIG"):
        yield _given(Path(given), f"the cluster of KUBECONFIG={given}")
    elif cluster.kit() is not None:
        yield from _kit()
    else:
        yield from _kind()


def _given(kubeconfig: Path, said: str, **values: Any) -> Place:
    found = values
    if file := os.environ.get("E2E_VALUES"):
        found = yaml.safe_load(Path(file).read_text())
    return Place(said=said, cluster=cluster.Cluster(kubeconfig=kubeconfig, kubectl_path="kubectl"), values=found)


def _kit() -> Iterator[Place]:
    kit = cluster.kit()
    assert kit is not None
    made = tool("make_images").make(kit, CACHE / "images", ["operator", "router", "worker"])
    mounts = [part for mount in made["mounts"] for part in ("--mount", mount)]
    with cluster.node(STATE, index=INDEX, options=mounts) as running:
        cluster.load_images(STATE, *map(Path, made["archives"]))
        pid = json.loads((STATE / "running.json").read_text())["pid"]
        said = f"the test cluster kit, number {INDEX}, images {made['tag']}"
        yield Place(said=said, cluster=running, values={"image": {"tag": made["tag"]}}, node_pid=pid)


def _kind() -> Iterator[Place]:
    """Images by Docker. The node is made anew and removed afterwards."""
    tags = {"operator": "e2e", "router": "e2e", "worker": "e2e-cpu"}
    names = [f"baton/{name}:{tag}" for name, tag in tags.items()]
    for room, name in zip(tags, names, strict=True):
        _run("docker", "build", "--file", str(ROOT / room / "Dockerfile"), "--tag", name, str(ROOT))
    kubeconfig = STATE / "kind.kubeconfig"
    STATE.mkdir(parents=True, exist_ok=True)
    try:
        _run("kind", "create", "cluster", "--name", KIND_NAME, "--kubeconfig", str(kubeconfig), "--wait", "120s")
        _run("kind", "load", "docker-image", "--name", KIND_NAME, *names)
        yield _given(kubeconfig, "kind, images by Docker", image={"tag": "e2e"})
    finally:
        _run("kind", "delete", "cluster", "--name", KIND_NAME, "--kubeconfig", str(kubeconfig))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
