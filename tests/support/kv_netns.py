"""Two network namespaces behind a switch in a third, and processes inside them. Needs root, `ip`, veth and bridges.

A partition takes one port off the switch: both ends keep their link and their address, and every packet vanishes.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from support.kv_peer import serve

_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Net:
    """Hosts `left` and `right`, each an address in a namespace of its own."""

    name: str

    def namespace(self, host: str) -> str:
        return f"{self.name}-{host}"

    @staticmethod
    def address(host: str) -> str:
        return {"left": "10.231.7.1", "right": "10.231.7.2"}[host]

    def part(self) -> None:
        ip("-n", self.namespace("switch"), "link", "set", "right", "nomaster")

    def heal(self) -> None:
        ip("-n", self.namespace("switch"), "link", "set", "right", "master", "bridge0")


@contextmanager
def network() -> Iterator[Net]:
    """Raises OSError where this system cannot make one."""
    net = Net(f"bt{secrets.token_hex(3)}")
    made: list[str] = []
    try:
        for host in ("switch", "left", "right"):
            ip("netns", "add", net.namespace(host))
            made.append(net.namespace(host))
            ip("-n", net.namespace(host), "link", "set", "lo", "up")
        switch = net.namespace("switch")
        ip("-n", switch, "link", "add", "name", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        for host in ("left", "right"):
            own = net.namespace(host)
            ip("-n", switch, "link", "add", "name", host, "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", switch, "link", "set", host, "master", "bridge0", "up")
            ip("-n", own, "addr", "add", f"{net.address(host)}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
        yield net
    finally:
        for namespace in made:
            ip("netns", "del", namespace)


def serve_inside(pipe: Connection, name: str, incarnation: str, wire: str, namespace: str, address: str) -> None:
    """A Peer of a process that lives in that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["UCX_TLS"] = "tcp"
    serve(pipe, name, incarnation, wire, {"listen": f"{address}:0"})
