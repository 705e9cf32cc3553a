"""Real Kubernetes for tests: where it comes from, how it is started, and a small client for it.

Three ways, best first: `BATON_TEST_KUBECONFIG` names a cluster that is there already; `control_plane` starts etcd and
an API server (on request with controllers) on loopback ports in 3 s, without root, enough for CRDs, admission and
server-side apply; `node` starts a whole one-node cluster with real pods in 8 s, as root. The last two use the kit in
the folder that `BATON_TEST_CLUSTER_KIT` names, else in `../shared/cluster` beside this checkout. Whatever is started
ends with its `with` block. Tests are marked `cluster`; without a kit they are skipped with the reason.
"""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

KUBECONFIG_VARIABLE = "BATON_TEST_KUBECONFIG"
KIT_VARIABLE = "BATON_TEST_CLUSTER_KIT"
_ROOT = Path(__file__).resolve().parents[2]
_READY_S = 60.0
_NODE_TOOLS = ("containerd", "runc", "nft", "ip", "unshare", "openssl", "conntrack", "zstd")


class ClusterFailed(AssertionError):
    """The cluster did not start or a command failed; carries what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of the API server. `text` is its message when it refused."""

    status: int
    body: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status < 300

    @property
    def text(self) -> str:
        return "" if self.ok else str(self.body.get("message", ""))


@dataclass(slots=True, kw_only=True)
class Cluster:
    """A running cluster. `request` speaks to it in a millisecond, `kubectl` as a user would."""

    kubeconfig: Path
    kubectl_path: str
    programs: Path | None = None  # folder with kubectl and helm; None = those of the PATH
    _server: str = field(default="", init=False)
    _tls: ssl.SSLContext | None = field(default=None, init=False)
    _headers: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        config = json.loads(self.kubectl("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._server = cluster["server"]
        authority = base64.b64decode(cluster.get("certificate-authority-data", "")).decode()
        self._tls = ssl.create_default_context(cadata=authority or None)
        if "client-certificate-data" in user:
            parts = (user["client-key-data"], user["client-certificate-data"])
            with tempfile.NamedTemporaryFile() as pair:  # the library reads certificates from files only
                pair.write(b"\n".join(base64.b64decode(part) for part in parts))
                pair.flush()
                self._tls.load_cert_chain(pair.name)
        if "token" in user:
            self._headers["Authorization"] = f"Bearer {user['token']}"

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_s: float = 60.0) -> str:
        """Standard output. Raises ClusterFailed with standard error when the command fails and `check` is set."""
        done = subprocess.run(
            [self.kubectl_path, "--kubeconfig", str(self.kubeconfig), *arguments],
            input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False, env=_without_proxies(),
        )  # fmt: skip
        if check and done.returncode != 0:
            raise ClusterFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *,
        content_type: str = "application/json",
    ) -> Answer:  # fmt: skip
        """One request; `path` begins with /api or /apis and may have a query."""
        url = urllib.parse.urlsplit(self._server)
        connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=self._tls, timeout=30)
        try:
            headers = {**self._headers, "Content-Type": content_type, "Accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
            warnings = tuple(response.headers.get_all("Warning") or ())
            return Answer(status=response.status, body=json.loads(text or b"{}"), warnings=warnings)
        finally:
            connection.close()

    def apply(self, *files: Path) -> None:
        """Server-side apply; returns when every CRD in the files is served."""
        for file in files:
            self.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))
        self.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")

    def wait_until(self, what: str, ok: Any, *, timeout_s: float = 90.0) -> None:
        """Calls `ok()` until it is true. Raises ClusterFailed."""
        _wait(what, ok, timeout_s)


# ---- where it comes from ---------------------------------------------------------------------------------------------
def kit() -> Path | None:
    """Folder of the kit, or None."""
    folder = Path(os.environ.get(KIT_VARIABLE) or _ROOT.parent / "shared" / "cluster")
    return folder if (folder / "kube.py").is_file() else None


def why_no_control_plane() -> str:
    """Reason to skip a test that needs an API server; empty = there is one."""
    if os.environ.get(KUBECONFIG_VARIABLE):
        return "" if shutil.which("kubectl") else "kubectl is not installed"
    if kit() is None:
        return f"no cluster: set {KUBECONFIG_VARIABLE}, or {KIT_VARIABLE} to the folder of the test cluster kit"
    missing = [tool for tool in ("openssl", "zstd") if not shutil.which(tool)]
    return f"the test cluster needs {', '.join(missing)}" if missing else ""


def why_no_node() -> str:
    """Reason to skip a test that needs pods; empty = they can run."""
    if (reason := why_no_control_plane()) or os.environ.get(KUBECONFIG_VARIABLE):
        return reason
    if os.geteuid() != 0:
        return "a cluster with pods needs root"
    missing = [tool for tool in _NODE_TOOLS if not shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")]
    return f"a cluster with pods needs {', '.join(missing)}" if missing else ""


def programs() -> Path:
    """Folder of the kit's programs, unpacked on first use."""
    source = kit()
    if source is None:
        raise ClusterFailed(why_no_control_plane())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "baton" / "test-cluster"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["flock", str(folder / ".lock"), "sh", str(source / "build.sh"), str(folder)], check=True)
    return folder


def _given() -> Cluster | None:
    path = os.environ.get(KUBECONFIG_VARIABLE)
    return Cluster(kubeconfig=Path(path), kubectl_path="kubectl") if path else None


# ---- starting one ----------------------------------------------------------------------------------------------------
@contextmanager
def control_plane(folder: Path, *, controllers: bool = False, flags: Sequence[str] = ()) -> Iterator[Cluster]:
    """etcd and API server below `folder`; with `controllers` also Deployments, garbage collection and the like.

    `flags` are further ones of the API server, which a cluster that is there already does not get.
    """
    if (given := _given()) is not None:
        yield given
        return
    binaries, kube = programs(), _kube_module()
    net, pki = kube.Net(0), folder / "pki"
    client, peer, api = _free_ports(3)
    kube.make_pki(pki, net)
    server = f"https://127.0.0.1:{api}"
    kube.kubeconfig(folder / "kubeconfig", pki, "admin", server)
    kube.kubeconfig(folder / "controllers.kubeconfig", pki, "controller-manager", server)
    with ExitStack() as stack:
        stack.enter_context(_process(folder, _etcd(binaries, folder, client, peer)))
        stack.enter_context(_process(folder, [*_api_server(binaries, pki, client, api), *flags]))
        cluster = Cluster(kubeconfig=folder / "kubeconfig", kubectl_path=str(binaries / "kubectl"), programs=binaries)
        _wait("API server", lambda: _ready(cluster), _READY_S)
        if controllers:
            config = folder / "controllers.kubeconfig"
            stack.enter_context(_process(folder, _controllers(binaries, pki, config)))
        yield cluster


@contextmanager
def node(state: Path, *, index: int = 0, fresh: bool = True, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """A whole one-node cluster with real pods. `state` keeps imported images between uses; `options` go to `up`."""
    if (given := _given()) is not None:
        yield given
        return
    binaries, script = programs(), [sys.executable, str(_kit_or_fail() / "kube.py")]
    place = ["--state", str(state)]
    up = [*script, "up", *place, "--bin", str(binaries), "--index", str(index), *options]
    if fresh:
        up.append("--fresh")
    try:
        done = subprocess.run(up, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode != 0:
            raise ClusterFailed(f"{done.stdout}{done.stderr}")
        yield Cluster(kubeconfig=state / "kubeconfig", kubectl_path=str(binaries / "kubectl"), programs=binaries)
    finally:
        subprocess.run([*script, "down", *place], capture_output=True, check=False, timeout=60)


def load_images(state: Path, *archives: Path) -> None:
    """Import image archives on the node of `state`."""
    script = str(_kit_or_fail() / "kube.py")
    subprocess.run([sys.executable, script, "load", "--state", str(state), *map(str, archives)], check=True)


# ---- parts -----------------------------------------------------------------------------------------------------------
def _kit_or_fail() -> Path:
    folder = kit()
    if folder is None:
        raise ClusterFailed(why_no_control_plane())
    return folder


def _kube_module() -> ModuleType:
    """The kit's script as a module, for its certificates and kubeconfigs."""
    spec = importlib.util.spec_from_file_location("baton_test_kube", _kit_or_fail() / "kube.py")
    if spec is None or spec.loader is None:
        raise ClusterFailed("the kit's kube.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the kit's folder may be read-only
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def _etcd(binaries: Path, folder: Path, client: int, peer: int) -> list[str]:
    at = f"http://127.0.0.1:{peer}"
    return [
        str(binaries / "etcd"), "--name=etcd", f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls=http://127.0.0.1:{client}", f"--advertise-client-urls=http://127.0.0.1:{client}",
        f"--listen-peer-urls={at}", f"--initial-advertise-peer-urls={at}", f"--initial-cluster=etcd={at}",
    ]  # fmt: skip


def _api_server(binaries: Path, pki: Path, etcd: int, port: int) -> list[str]:
    issuer = "https://kubernetes.default.svc.cluster.local"
    return [
        str(binaries / "kube-apiserver"), "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
        f"--secure-port={port}", f"--etcd-servers=http://127.0.0.1:{etcd}", "--authorization-mode=RBAC",
        f"--client-ca-file={pki}/ca.crt", f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key", "--service-cluster-ip-range=10.96.0.0/16",
        f"--service-account-issuer={issuer}", f"--service-account-key-file={pki}/sa.pub",
        f"--service-account-signing-key-file={pki}/sa.key", "--endpoint-reconciler-type=none", "--profiling=false",
    ]  # fmt: skip


def _controllers(binaries: Path, pki: Path, config: Path) -> list[str]:
    return [
        str(binaries / "kube-controller-manager"), f"--kubeconfig={config}", f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}", "--secure-port=0", "--leader-elect=false",
        "--use-service-account-credentials=true", f"--service-account-private-key-file={pki}/sa.key",
        f"--root-ca-file={pki}/ca.crt", "--kube-api-qps=200", "--kube-api-burst=400",
    ]  # fmt: skip


@contextmanager
def _process(folder: Path, command: Sequence[str]) -> Iterator[None]:
    """Ends with the block, and with the test process however that ends."""
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    log_path = folder / f"{Path(command[0]).name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [*guard, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_without_proxies()
        )
    try:
        yield
    finally:
        process.kill()  # nothing of it is kept
        process.wait()


def _ready(cluster: Cluster) -> bool:
    try:
        return cluster.request("GET", "/api/v1/namespaces/default").ok  # there once the server has set itself up
    except (OSError, ValueError):
        return False


def _wait(what: str, ok: Any, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ok():
        if time.monotonic() > deadline_s:
            raise ClusterFailed(f"{what}: not there after {timeout_s:.0f} s")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _without_proxies() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
