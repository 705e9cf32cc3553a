"""A real Kubernetes cluster for tests marked `cluster`, from the kit that lies beside the repository.

The one place that says where the kit, its programs and its state are: settings BATON_CLUSTER_KIT, BATON_CLUSTER_CACHE
and BATON_CLUSTER_INDEX. `missing()` says why there can be no cluster here; a test skips with that text. One cluster
per index at a time: a lock file makes a second user wait. The cluster never outlives the `with` block.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from baton_common.settings import resolve

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("containerd", "runc", "nft", "ip", "conntrack", "openssl", "zstd")
PACKAGES = "containerd runc containernetworking-plugins nftables conntrack iproute2 openssl zstd"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    kit: Annotated[str, Field(description="folder of the cluster kit")] = str(ROOT.parent / "shared" / "cluster")
    cache: Annotated[str, Field(description="programs, images and state")] = str(Path.home() / ".cache/baton/kube")
    index: Annotated[int, Field(ge=0, le=9, description="which of ten address ranges")] = 0

    @property
    def programs(self) -> Path:
        return Path(self.cache) / "bin"


def settings() -> ClusterSettings:
    return resolve(ClusterSettings, section="cluster", environment=os.environ).value


def missing() -> str | None:
    """Why no cluster can run here; None when one can."""
    if os.geteuid() != 0:
        return "a cluster of its own needs root"
    if not (Path(settings().kit) / "kube.py").exists():
        return f"no cluster kit at {settings().kit}; set BATON_CLUSTER_KIT"
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if not Path("/usr/lib/cni/bridge").exists():
        absent.append("CNI plugins")
    return f"{', '.join(absent)} missing: apt-get install --no-install-recommends {PACKAGES}" if absent else None


class CommandFailed(AssertionError):
    """A command of a test ended badly; the text has all it said."""


def run(
    *command: str, stdin: str | None = None, environment: Mapping[str, str] | None = None, timeout_s: float = 300
) -> str:
    """Output of a command. Raises CommandFailed with everything that it wrote."""
    done = subprocess.run(
        command, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def programs() -> Path:
    """Folder with kubectl, helm and the control plane; unpacked on the first call."""
    folder = settings().programs
    run("sh", str(Path(settings().kit) / "build.sh"), str(folder), timeout_s=1800)
    return folder


def promtool() -> str | None:
    return shutil.which("promtool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running cluster, and the commands against it. The host reaches its pod and service addresses directly."""

    kubeconfig: Path
    bin: Path
    state: Path
    kit: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {**kept, "KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        command = (str(self.bin / "kubectl"), *arguments)
        return run(*command, stdin=stdin, environment=self.environment, timeout_s=timeout_s)

    def helm(self, *arguments: str, timeout_s: float = 300) -> str:
        return run(str(self.bin / "helm"), *arguments, environment=self.environment, timeout_s=timeout_s)

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`, read."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        listing = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(listing))

    def load(self, *archives: Path) -> None:
        """Imports image archives on the node."""
        kube = (sys.executable, str(self.kit / "kube.py"))
        run(*kube, "load", "--state", str(self.state), *map(str, archives), timeout_s=600)


@contextmanager
def running_cluster(
    *, fresh: bool = True, mounts: Sequence[str] = (), flags: Sequence[str] = (), wait_s: float = 900
) -> Iterator[Cluster]:
    """Brings a cluster up and takes it down again. `fresh`: without objects of former runs (images are kept).

    `mounts`: SOURCE:TARGET, bound read-only into every container. `flags`: more of `kube.py up`.
    """
    chosen = settings()
    folder, kit = programs(), Path(chosen.kit)
    state = Path(chosen.cache) / f"state-{chosen.index}"
    kube = (sys.executable, str(kit / "kube.py"))
    with _exclusive(Path(chosen.cache) / f"state-{chosen.index}.lock", wait_s):
        options = [*(["--fresh"] if fresh else []), *(part for mount in mounts for part in ("--mount", mount)), *flags]
        where = ("--state", str(state))
        run(*kube, "down", *where)
        try:
            run(*kube, "up", *where, "--bin", str(folder), "--index", str(chosen.index), *options)
            yield Cluster(kubeconfig=state / "kubeconfig", bin=folder, state=state, kit=kit)
        finally:
            run(*kube, "down", *where)


@contextmanager
def _exclusive(path: Path, wait_s: float) -> Iterator[None]:
    deadline = time.monotonic() + wait_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is held by another user; set BATON_CLUSTER_INDEX") from None
                time.sleep(0.5)
        yield
