"""The operator as a real process beside a cluster, with its health and metrics within reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path


class Operator:
    """One replica. `images`: (router, worker). `program`: what Python runs."""

    def __init__(
        self, kubeconfig: Path, log: Path, port: int, *, images: tuple[str, str], options: Sequence[str] = (),
        program: Sequence[str] = ("-m", "baton_operator.main"),
    ) -> None:  # fmt: skip
        self.metrics_port, self.health_port, self.log = port, port + 1, log
        command = [
            sys.executable, *program, "--kubeconfig", str(kubeconfig),
            "--metrics-port", str(self.metrics_port), "--health-port", str(self.health_port),
            "--router-image", images[0], "--worker-image", images[1], *options,
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def get(self, path: str, port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, *labels: str) -> float:
        """Sum of the series with all these labels, Leases left out."""
        total = 0.0
        for line in self.get("/metrics", self.metrics_port).splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in labels):
                total += 0.0 if "leases" in line else float(line.rpartition(" ")[2])
        return total

    def leads(self) -> bool:
        try:
            return self.metric("baton_operator_leader") == 1
        except OSError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=20)


def until(ok: Callable[[], bool], what: str, timeout_s: float = 120) -> float:
    """Seconds that it took."""
    began_s = time.monotonic()
    while not ok():
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - began_s
