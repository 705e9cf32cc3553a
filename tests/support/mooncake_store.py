"""A real Mooncake master as a process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from support.kv_world import eventually
from support.processes import free_ports

HOST = "127.0.0.1"


class MooncakeMaster:
    """mooncake_master; a short time to live of its clients, so that the loss of holders shows soon."""

    def __init__(self, *, lease_ms: int = 5000) -> None:
        self._port, metrics_port = free_ports(2)
        self.address = f"{HOST}:{self._port}"
        self._command = [
            str(Path(sys.executable).with_name("mooncake_master")),
            f"--rpc_address={HOST}",
            f"--rpc_port={self._port}",
            f"--metrics_host={HOST}",
            f"--metrics_port={metrics_port}",
            f"--default_kv_lease_ttl={lease_ms}",
            "--client_ttl=2",
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._listens, "the master listens")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.kill()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self._port)) == 0
