"""Where the API server is and who we are: a kubeconfig file, or the files that Kubernetes mounts into a pod.

Tokens of a pod rotate, so they are read from their file again every minute by whoever asks for `token()`. Understands
of a kubeconfig certificates, tokens, token files and programs that print a token (`plugin.py`).
"""

from __future__ import annotations

import base64
import binascii
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from baton_common.clock import Clock
from baton_common.errors import ConfigError
from baton_common.kube.objects import Object, is_true, mapping, objects, text
from baton_common.kube.plugin import LoginProgram, login_program

POD_FILES = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_FRESH_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """`namespace` is where the operator itself lives: its Lease goes there unless told otherwise."""

    server: str
    namespace: str
    ca_pem: str = ""
    certificate_pem: str = field(default="", repr=False)
    key_pem: str = field(default="", repr=False)
    fixed_token: str = field(default="", repr=False)
    token_file: Path | None = None
    login: LoginProgram | None = None
    insecure: bool = False

    def read_token(self) -> str:
        """Bearer token, "" without one. Reads the file, or runs the program, each time."""
        if self.login is not None:
            return self.login.token()
        if self.token_file is None:
            return self.fixed_token
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read the token {self.token_file}: {error.strerror}") from None

    def ssl_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca_pem or None)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate_pem:
            # ssl only loads a client certificate from files
            with tempfile.TemporaryDirectory(prefix="baton-") as folder:
                pair = Path(folder) / "client.pem"
                pair.touch(mode=0o600)
                pair.write_text(f"{self.certificate_pem}\n{self.key_pem}")
                context.load_cert_chain(pair)
        return context


class TokenSource:
    """The current bearer token, at most a minute old."""

    def __init__(self, credentials: Credentials, clock: Clock) -> None:
        self._credentials = credentials
        self._clock = clock
        self._token = ""
        self._read_s: float | None = None

    def token(self) -> str:
        now_s = self._clock.now()
        if self._read_s is None or now_s - self._read_s > _TOKEN_FRESH_S:
            self._token = self._credentials.read_token()
            self._read_s = now_s
        return self._token


def find_credentials(kubeconfig: str, environment: Mapping[str, str]) -> Credentials:
    """From the named kubeconfig, else from the pod's own files. Raises ConfigError that says what was looked at."""
    if kubeconfig:
        return from_kubeconfig(Path(kubeconfig).expanduser())
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if host and (POD_FILES / "token").is_file():
        return from_pod(host, port, POD_FILES)
    raise ConfigError("no cluster: give --kubeconfig FILE, or run in a pod with a service account", param="kubeconfig")


def from_pod(host: str, port: str, folder: Path) -> Credentials:
    try:
        return Credentials(
            server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
            namespace=(folder / "namespace").read_text().strip(),
            ca_pem=(folder / "ca.crt").read_text(),
            token_file=folder / "token",
        )
    except OSError as error:
        raise ConfigError(f"cannot read the pod's service account in {folder}: {error.strerror}") from None


def from_kubeconfig(file: Path) -> Credentials:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", param="kubeconfig") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no valid YAML: {' '.join(str(error).split())}", param="kubeconfig") from None
    context = _named(document, "contexts", text(document, "current-context"), "context", file)
    cluster = _named(document, "clusters", text(context, "cluster"), "cluster", file)
    user = _named(document, "users", text(context, "user"), "user", file)
    if mapping(user, "auth-provider"):
        raise ConfigError(f"{file}: its user logs in by an auth-provider, which is gone; use exec", param="kubeconfig")
    program = mapping(user, "exec")
    token_file = text(user, "tokenFile")
    return Credentials(
        server=text(cluster, "server").rstrip("/"),
        namespace=text(context, "namespace") or "default",
        ca_pem=_pem(cluster, "certificate-authority", file),
        certificate_pem=_pem(user, "client-certificate", file),
        key_pem=_pem(user, "client-key", file),
        fixed_token=text(user, "token"),
        token_file=file.parent / token_file if token_file else None,
        login=login_program(program, cluster) if program else None,
        insecure=is_true(cluster, "insecure-skip-tls-verify"),
    )


def _named(document: Object, group: str, name: str, inner: str, file: Path) -> Object:
    for entry in objects(document, group):
        if text(entry, "name") == name:
            return mapping(entry, inner)
    raise ConfigError(f"{file}: no {inner} named {name!r}; set current-context to one that exists", param="kubeconfig")


def _pem(entry: Object, key: str, file: Path) -> str:
    """Inline data first, then a file beside the kubeconfig; "" when there is neither."""
    try:
        if data := text(entry, f"{key}-data"):
            return base64.b64decode(data).decode()
        if path := text(entry, key):
            return (file.parent / path).read_text()
    except (OSError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{file}: {key} cannot be read: {error}", param="kubeconfig") from None
    return ""
