"""Which addresses the workers' Services have at the moment, from their EndpointSlices; the fleet follows.

Conditions of endpoints are not asked: a worker is only Ready once a router holds its stream, so it is dialled before,
and a terminating one as long as it is listed. Knows the API only through `Mirror`, and nothing of gates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from baton_common.clock import Clock
from baton_common.kube.client import KubeClient
from baton_common.kube.kinds import ENDPOINT_SLICE
from baton_common.kube.mirror import WATCH_S, Mirror
from baton_common.kube.objects import Object, integer, is_true, objects, text, texts
from baton_router.fleet import Fleet

log = logging.getLogger("baton.router.discovery")

PORT_NAME = "grpc"
SERVICE_LABEL = "kubernetes.io/service-name"


def pods_by_address(slices: Iterable[Object]) -> dict[str, str]:
    """host:port -> name of the pod there ("" when the slice names none), over all slices of all Services.

    A pod with addresses of both families is reached by IPv4 alone, so that it is one worker. An address that two pods
    claim (slices follow each other, not at once) belongs to the one that is not terminating.
    """
    claims: dict[str, tuple[bool, bool, str]] = {}  # address -> (terminating, nameless, pod); the least wins
    families: dict[str, str] = {}  # address -> family
    for item in slices:
        family, port = text(item, "addressType"), _port(item)
        if family not in ("IPv4", "IPv6") or not port:
            continue
        for endpoint in objects(item, "endpoints"):
            hosts = texts(endpoint, "addresses")
            if not hosts:
                continue
            # all addresses of one endpoint mean the same thing; the first is the one to use
            address = f"[{hosts[0]}]:{port}" if family == "IPv6" else f"{hosts[0]}:{port}"
            pod = _pod(endpoint)
            claim = (is_true(endpoint, "conditions", "terminating"), not pod, pod)
            claims[address] = min(claim, claims.get(address, claim))
            families[address] = family
    pods = {address: pod for address, (_, _, pod) in claims.items()}
    by_ipv4 = {pod for address, pod in pods.items() if families[address] == "IPv4" and pod}
    return {
        address: pod for address, pod in sorted(pods.items()) if families[address] == "IPv4" or pod not in by_ipv4
    }


def _port(item: Object) -> int:
    return next((integer(port, "port") for port in objects(item, "ports") if text(port, "name") == PORT_NAME), 0)


def _pod(endpoint: Object) -> str:
    return text(endpoint, "targetRef", "name") if text(endpoint, "targetRef", "kind") == "Pod" else ""


class Discovery:
    """Keeps `fleet` assigned to the endpoints of `services`. `endpoints` is the number of addresses known."""

    def __init__(
        self,
        client: KubeClient,
        fleet: Fleet,
        *,
        namespace: str,
        services: Sequence[str],
        clock: Clock,
        random: Callable[[], float],
        watch_s: int = WATCH_S,
    ) -> None:
        self.endpoints = 0
        self._fleet = fleet
        self._names = f"{', '.join(services)} in namespace {namespace}"
        fleet.absence = f"not asked the API server yet for the endpoints of Services {self._names}"
        self._mirror = Mirror(
            client, ENDPOINT_SLICE, namespace, selector=f"{SERVICE_LABEL} in ({','.join(services)})",
            changed=self._changed, troubled=self._troubled, clock=clock, random=random, watch_s=watch_s,
        )  # fmt: skip

    async def run(self) -> None:
        """Ends only by cancellation."""
        await self._mirror.run()

    def _changed(self, slices: Collection[Object]) -> None:
        pods = pods_by_address(slices)
        self._fleet.absence = self._absence(slices)
        if len(pods) != self.endpoints:
            log.info("Services %s list %d addresses of workers", self._names, len(pods))
        self.endpoints = len(pods)
        self._fleet.assign(pods)

    def _absence(self, slices: Collection[Object]) -> str:
        if not slices:
            return f"Services {self._names} have no EndpointSlices; do they exist, and do their selectors match pods?"
        if not any(_port(item) for item in slices):
            # a headless Service without any endpoint has a slice without ports
            return f"Services {self._names} have no pods with an address and a port named {PORT_NAME} yet"
        return f"Services {self._names} have no pods with an address yet"

    def _troubled(self, line: str) -> None:
        self._fleet.trouble = line
