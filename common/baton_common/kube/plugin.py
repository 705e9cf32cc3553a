"""Log-in by a program, as the kubeconfigs of managed clouds have it: it prints a token (client.authentication.k8s.io).

The program is trusted as far as the kubeconfig that names it. It runs without a terminal: what asks a human fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton_common.errors import ConfigError
from baton_common.kube.objects import Json, Object, canonical, objects, text, texts

_RUN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginProgram:
    """`environment` comes on top of our own. `hint`: how to install it, in the words of the kubeconfig."""

    command: tuple[str, ...]
    api_version: str
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    cluster: Object | None = None  # told to programs that ask for it
    hint: str = ""

    def token(self) -> str:
        """Runs it. Raises ConfigError with what it said."""
        request: dict[str, Json] = {"interactive": False}
        if self.cluster is not None:
            request["cluster"] = self.cluster
        info: Object = {"apiVersion": self.api_version, "kind": "ExecCredential", "spec": request}
        environment = {**os.environ, **self.environment, "KUBERNETES_EXEC_INFO": canonical(info)}
        name = self.command[0]
        try:
            done = subprocess.run(
                self.command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_RUN_S, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            hint = f": {' '.join(self.hint.split())}" if self.hint else ""
            raise ConfigError(f"the kubeconfig logs in by {name}, which is not installed{hint}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"the kubeconfig logs in by {name}, which did not run: {error}") from None
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-1]
            raise ConfigError(f"{name}, by which the kubeconfig logs in, ended with {done.returncode}: {said}")
        return self._read(done.stdout)

    def _read(self, output: str) -> str:
        try:
            token = text(json.loads(output), "status", "token")
        except ValueError:
            token = ""
        if not token:
            raise ConfigError(f"{self.command[0]}, by which the kubeconfig logs in, printed no token")
        return token


def login_program(entry: Object, cluster: Object) -> LoginProgram:
    """From the `exec` entry of a kubeconfig's user."""
    shared = ("server", "certificate-authority-data", "tls-server-name")
    told = {key: text(cluster, key) for key in shared if text(cluster, key)}
    return LoginProgram(
        command=(text(entry, "command"), *texts(entry, "args")),
        api_version=text(entry, "apiVersion") or "client.authentication.k8s.io/v1",
        environment={text(item, "name"): text(item, "value") for item in objects(entry, "env")},
        cluster=told if entry.get("provideClusterInfo") is True else None,
        hint=text(entry, "installHint"),
    )
