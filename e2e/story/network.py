"""Connections that were really made, and a judge of NetworkPolicies over them.

The test cluster does not enforce policies, so they are evaluated here: every connection must be allowed at both ends,
and every allowed peer must have been met. Connections come from the connection tracking of the kit's node, as they
begin. Left out: what kubelet and API server dial from the node itself (every network plug-in lets a pod's own node in).
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from story.place import INDEX, Place
from story.watch import PodHistory, Seen

HOST = f"172.29.{INDEX}.1"
NODE_ADDRESSES = frozenset({f"172.29.{INDEX}.2", f"10.{244 - INDEX}.0.1"})  # its own, and its end of the pods' bridge
_LINE = re.compile(r"\[NEW\] (\w+) .*?src=(\S+) dst=(\S+) sport=\d+ dport=(\d+) .*?src=(\S+) dst=\S+ sport=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """One kind of connection, after Service addresses are resolved. A pod or, where there is none, an address."""

    source: str
    target: str
    protocol: str
    port: int


@dataclass(slots=True, kw_only=True)
class Connections:
    """Everything that began since `recording` did; empty where the node is not ours."""

    place: Place
    history: PodHistory
    met: set[Met] = field(default_factory=set)

    @contextmanager
    def recording(self) -> Iterator[Connections]:
        if self.place.node_pid is None:
            yield self
            return
        inside = ["nsenter", "--target", str(self.place.node_pid), "--net", "conntrack", "-E", "-e", "NEW"]
        with subprocess.Popen(inside, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                process.terminate()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if found := _LINE.search(line):
                protocol, source, _, _, target, port = found.groups()
                self.met.add(Met(source=source, target=target, protocol=protocol.upper(), port=int(port)))

    def pod(self, address: str) -> Seen | None:
        return self.history.by_address.get(address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One peer of one rule on one port: the smallest thing that a policy allows. `peer` None: anyone."""

    policy: str
    selector: Mapping[str, Any]
    namespace: str
    direction: str
    peer: Mapping[str, Any] | None
    protocol: str
    port: int | str | None  # a name is one of the target's ports

    def __str__(self) -> str:
        return f"{self.policy} {self.direction} {self.peer or 'anyone'} {self.protocol}/{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Of the policies of one namespace; `stands_for` names the pod that an address outside plays."""

    policies: Sequence[Mapping[str, Any]]
    history: PodHistory
    stands_for: Mapping[str, Seen] = field(default_factory=dict)

    def grants(self) -> list[Grant]:
        return [
            Grant(
                policy=policy["metadata"]["name"], namespace=policy["metadata"]["namespace"], direction=direction,
                selector=policy["spec"]["podSelector"], peer=peer, protocol=port.get("protocol", "TCP"),
                port=port.get("port"),
            )
            for policy in self.policies
            for direction, peers in (("ingress", "from"), ("egress", "to"))
            for rule in policy["spec"].get(direction, ())
            for peer in rule.get(peers) or [None]
            for port in rule.get("ports") or [{}]
        ]  # fmt: skip

    def refused(self, met: Met) -> str:
        """Why the connection would not be made under the policies; empty: it would."""
        for direction, own, other in (("egress", met.source, met.target), ("ingress", met.target, met.source)):
            pod = self.history.by_address.get(own)
            if pod is None or not self._isolated(pod, direction):
                continue
            if not any(self.allows(grant, pod, other, met) for grant in self.grants() if grant.direction == direction):
                return f"{direction} of {pod.role}: {self.name(met.source)} -> {self.name(met.target)}:{met.port}"
        return ""

    def used(self, grant: Grant, met: Met) -> bool:
        own, other = (met.source, met.target) if grant.direction == "egress" else (met.target, met.source)
        pod = self.history.by_address.get(own)
        return pod is not None and self.allows(grant, pod, other, met)

    def allows(self, grant: Grant, pod: Seen, other: str, met: Met) -> bool:
        if pod.namespace != grant.namespace or not _matches(grant.selector, pod.labels):
            return False
        target = self.history.by_address.get(met.target)
        port = grant.port
        if isinstance(port, str):
            port = target.ports.get(port, -1) if target else -1
        if grant.protocol != met.protocol or port not in (None, met.port):
            return False
        return grant.peer is None or self._is_peer(grant.peer, grant.namespace, other)

    def name(self, address: str) -> str:
        pod = self.history.by_address.get(address) or self.stands_for.get(address)
        return address if pod is None else pod.role

    def _isolated(self, pod: Seen, direction: str) -> bool:
        return any(
            policy["metadata"]["namespace"] == pod.namespace
            and direction.capitalize() in policy["spec"]["policyTypes"]
            and _matches(policy["spec"]["podSelector"], pod.labels)
            for policy in self.policies
        )

    def _is_peer(self, peer: Mapping[str, Any], namespace: str, address: str) -> bool:
        if block := peer.get("ipBlock"):
            within = ip_address(address) in ip_network(block["cidr"])
            return within and not any(ip_address(address) in ip_network(one) for one in block.get("except", ()))
        pod = self.history.by_address.get(address) or self.stands_for.get(address)
        if pod is None:
            return False
        wanted = peer.get("namespaceSelector")
        if wanted is None:
            home = pod.namespace == namespace
        else:
            home = _matches(wanted, {"kubernetes.io/metadata.name": pod.namespace})
        return home and _matches(peer.get("podSelector", {}), pod.labels)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for term in selector.get("matchExpressions", ()):
        value, values = labels.get(term["key"]), term.get("values", ())
        fits = {
            "In": value in values, "NotIn": value not in values,
            "Exists": value is not None, "DoesNotExist": value is None,
        }  # fmt: skip
        if not fits[term["operator"]]:
            return False
    return True
