"""What the operator knows of its cluster: which optional kinds it serves, and where its API server answers.

Looked up at the start and again once per resync: a Prometheus operator installed later is noticed without a restart.
What may not be read (a namespaced operator has few rights) counts as not there.
"""

from __future__ import annotations

import logging

from baton_common.kube.client import KubeClient
from baton_common.kube.errors import KubeError
from baton_common.kube.kinds import ENDPOINT_SLICE
from baton_common.kube.objects import Object, integer, objects, text, texts
from baton_operator.config import OperatorConfig
from baton_operator.kinds import OPTIONAL_KINDS, SERVICE
from baton_operator.plan.intake import Platform
from baton_operator.prerequisites import ClusterFacts

log = logging.getLogger("baton.operator.facts")

_API_NAMESPACE = "default"
_API_SERVICE = "kubernetes"


async def look_up(client: KubeClient, config: OperatorConfig) -> ClusterFacts:
    """Raises KubeError only when the API server does not answer."""
    served = frozenset([kind for kind in OPTIONAL_KINDS if await client.serves(kind)])
    platform = Platform(
        router_image=config.router_image,
        worker_image=config.worker_image,
        pull_secrets=config.image_pull_secrets,
        api_servers=await _api_servers(client),
    )
    return ClusterFacts(platform=platform, served=served)


async def _api_servers(client: KubeClient) -> tuple[tuple[str, int], ...]:
    """Cluster address and real addresses, since network policies see either; empty = unknown."""
    selector = f"kubernetes.io/service-name={_API_SERVICE}"
    try:
        slices = await client.list(ENDPOINT_SLICE, _API_NAMESPACE, selector=selector)
        service = await client.get(SERVICE, _API_NAMESPACE, _API_SERVICE)
    except KubeError as error:
        if not error.refused:
            raise
        log.info("the API server's addresses may not be read; routers may reach any address at its ports")
        return ()
    real = {
        (address, integer(port, "port"))
        for item in slices
        for port in objects(item, "ports")
        for endpoint in objects(item, "endpoints")
        for address in texts(endpoint, "addresses")
    }
    return tuple(sorted(real | _cluster_addresses(service))) if real else ()


def _cluster_addresses(service: Object | None) -> set[tuple[str, int]]:
    address = text(service, "spec", "clusterIP")
    return {(address, integer(port, "port")) for port in objects(service, "spec", "ports")} if address else set()
