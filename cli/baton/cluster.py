"""The way from the command line to a cluster: which kubeconfig, which client, and what to do when the API says no.

The order is kubectl's: --kubeconfig, then KUBECONFIG, then ~/.kube/config, then the service account of a pod. Every
refusal of the API server becomes a ClusterFailed that says what to do. Only reads; knows no service.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from baton_common.clock import SystemClock
from baton_common.errors import BatonError, ConfigError
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials, find_credentials
from baton_common.kube.errors import KubeError, NotFound
from baton_operator.kinds import INFERENCE_SERVICE

INSTALL = "helm install baton charts/baton --namespace baton-system --create-namespace --wait"
_TIMEOUT_S = 10.0


class ClusterFailed(BatonError):
    """The API server cannot be asked, or does not answer what was asked; the message says what to do."""


def credentials(kubeconfig: Path | None, environment: Mapping[str, str], *, home: Path) -> Credentials:
    """Raises ConfigError that says where it looked."""
    file = kubeconfig or _from_environment(environment.get("KUBECONFIG", ""))
    if file is None and (home / ".kube" / "config").is_file():
        file = home / ".kube" / "config"
    if file is None and not environment.get("KUBERNETES_SERVICE_HOST"):
        raise ConfigError(
            f"no cluster: give --kubeconfig FILE or set KUBECONFIG; {home}/.kube/config does not exist",
            param="kubeconfig",
        )
    return find_credentials(str(file) if file else "", environment)


def _from_environment(value: str) -> Path | None:
    """kubectl merges several files; one is enough here, and which one is not for us to guess."""
    files = [Path(part) for part in value.split(os.pathsep) if part]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        names = ", ".join(str(file) for file in found)
        raise ConfigError(f"KUBECONFIG names several files ({names}); give one with --kubeconfig", param="kubeconfig")
    return next(iter((*found, *files)), None)


def client(found: Credentials) -> KubeClient:
    """Use as `async with`."""
    return KubeClient(found, manager="baton-cli", clock=SystemClock(), timeout_s=_TIMEOUT_S, may_write=lambda: False)


def explained(error: KubeError, *, server: str, where: str) -> ClusterFailed:
    """`where`: what was looked at, like "namespace chat"."""
    if error.status == 0:
        text = f"{error.message}; is the cluster at {server} up, and is this the right kubeconfig?"
    elif error.status == 401:
        text = f"{server} does not know you ({error.message}); log in again, or give another --kubeconfig"
    elif error.status == 403:
        text = (
            f"you may not look at InferenceServices in {where}: {error.message}; ask for get and list on "
            f"{INFERENCE_SERVICE.resource} and pods there"
        )
    elif isinstance(error, NotFound):
        text = f"{server} has no InferenceServices: the CRDs are missing; install the chart: {INSTALL}"
    else:
        text = f"{server}: {error.message}"
    return ClusterFailed(text)
