"""A real Prometheus beside the cluster, with the scrape configuration that docs/monitoring.md tells users to write.

Only what differs from outside is replaced: pods are discovered through a file that carries the same labels, because
Debian builds Prometheus without Kubernetes discovery. Added are a short interval and the alert rules.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.chart import CHART, ROOT

from story.watch import PodHistory

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
    def running(cls, history: PodHistory, folder: Path) -> Iterator[Prometheus | None]:
        """None where the program is not installed. Serves when the block begins."""
        if shutil.which(PROGRAM) is None:
            yield None
            return
        file, log, targets = folder / "prometheus.yml", folder / "prometheus.log", folder / "targets.json"
        file.write_text(yaml.safe_dump(_configuration(targets)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            PROGRAM, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}", "--log.level=warn",
        ]  # fmt: skip
        ended = threading.Event()
        discovery = threading.Thread(target=_discover, args=(history, targets, ended), name="discovery", daemon=True)
        discovery.start()
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            try:
                made = cls(url=f"http://{address}", log=log)
                made.wait_up(process)
                yield made
            finally:
                process.terminate()
                ended.set()

    def wait_up(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 60
        with httpx.Client(trust_env=False) as client:
            while True:
                try:
                    if client.get(f"{self.url}/-/ready").status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                assert process.poll() is None, self.log.read_text()
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.2)

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


def _configuration(targets: Path) -> dict[str, Any]:
    written = documented_scrape()
    for job in written["scrape_configs"]:
        assert [finder["role"] for finder in job.pop("kubernetes_sd_configs")] == ["pod"]
        job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": INTERVAL}]
    rules = [str(file) for file in sorted((CHART / "alerts").glob("*.yaml"))]
    times = {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL}
    return {"global": times, "rule_files": rules, **written}


def _discover(history: PodHistory, file: Path, ended: threading.Event) -> None:
    """Keeps the file of targets as it would be with role pod: one per declared port of a container."""
    while not ended.is_set():
        found = [target for pod in list(history.pods.values()) for target in _targets(pod)]
        half = file.with_suffix(".part")
        half.write_text(json.dumps(found))
        half.rename(file)
        ended.wait(1)


def _targets(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    address, metadata = pod.get("status", {}).get("podIP"), pod["metadata"]
    if not address or pod["status"]["phase"] in ("Succeeded", "Failed"):
        return
    labels = {
        f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', key)}": value
        for key, value in metadata.get("labels", {}).items()
    }
    labels |= {
        "__meta_kubernetes_namespace": metadata["namespace"], "__meta_kubernetes_pod_name": metadata["name"],
    }  # fmt: skip
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            named = {**labels, "__meta_kubernetes_pod_container_port_name": port.get("name", "")}
            yield {"targets": [f"{address}:{port['containerPort']}"], "labels": named}
