"""A real Prometheus beside the cluster, with the scrape configuration that docs/monitoring.md tells users to write.

Only what differs from outside is added: how to reach the API server, a short interval, and the alert rules as files.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.chart import CHART, ROOT
from support.cluster import Cluster

PROGRAM = "prometheus"
PAGE = ROOT / "docs/monitoring.md"
INTERVAL = "2s"


def documented_scrape() -> dict[str, Any]:
    """The YAML block of the page that has `scrape_configs`."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found: list[dict[str, Any]] = [block for block in map(yaml.safe_load, blocks) if "scrape_configs" in block]
    assert len(found) == 1, f"{len(found)} blocks with scrape_configs in {PAGE}"
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    url: str
    log: Path

    @classmethod
    @contextmanager
    def running(cls, cluster: Cluster, folder: Path) -> Iterator[Prometheus | None]:
        """None where the program is not installed. Serves when the block begins."""
        if shutil.which(PROGRAM) is None:
            yield None
            return
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(_configuration(cluster, folder)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            PROGRAM, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}", "--log.level=warn",
        ]  # fmt: skip
        log = folder / "prometheus.log"
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            try:
                yield cls(url=f"http://{address}", log=log)
            finally:
                process.terminate()

    def ask(self, path: str, **parameters: str) -> Any:
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = client.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """The vector that an instant query gives now."""
        found: list[dict[str, Any]] = self.ask("query", query=text)["result"]
        return found

    def targets(self) -> dict[str, str]:
        """Health by scraped address."""
        active = self.ask("targets", state="active")["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in active}

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing ones."""
        found: list[dict[str, Any]] = self.ask("alerts")["alerts"]
        return found


def _configuration(cluster: Cluster, folder: Path) -> dict[str, Any]:
    written = documented_scrape()
    access = _api_access(cluster, folder)
    for job in written["scrape_configs"]:
        for finder in job["kubernetes_sd_configs"]:
            finder.update(access)
    rules = [str(file) for file in sorted((CHART / "alerts").glob("*.yaml"))]
    times = {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL}
    return {"global": times, "rule_files": rules, **written}


def _api_access(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """As the kubeconfig says: a client certificate or a token."""
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
    server, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    tls = {"ca_file": _file(folder / "ca.crt", server["certificate-authority-data"])}
    access: dict[str, Any] = {"api_server": server["server"], "tls_config": tls}
    if "client-certificate-data" in user:
        tls["cert_file"] = _file(folder / "client.crt", user["client-certificate-data"])
        tls["key_file"] = _file(folder / "client.key", user["client-key-data"])
    else:
        access["authorization"] = {"credentials": user["token"]}
    return access


def _file(path: Path, data: str) -> str:
    path.write_bytes(base64.b64decode(data))
    return str(path)
