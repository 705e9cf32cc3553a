"""How the service is reached and who may talk to whom.

Connections, each allowed on both ends and nothing else: clients -> router (http); router -> workers (grpc); sender of
KV -> receiver (peer: prefill -> decode, for what decode holds the other way, and from a decode worker that drains to
another); workers -> a Mooncake store's master, and each other's part of it; Prometheus -> all (metrics, from inside the
cluster); all -> DNS; all -> the collector of spans; router -> API server (it watches endpoints); fetching containers ->
the model's server. Before any of it, a policy that denies all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from baton_common.kube.objects import Json, Object
from baton_operator.kinds import HTTP_ROUTE, INGRESS, NETWORK_POLICY, SERVICE
from baton_operator.plan import commands
from baton_operator.plan.blueprint import Blueprint, Pool
from baton_operator.plan.child import Child, child
from baton_operator.plan.labels import SERVICE_LABEL, Component, role_selector
from baton_operator.plan.names import child_name, label_value

_DNS_PORT = 53
_HTTPS_PORT = 443
_API_PORTS = (443, 6443)
_SENDS_TO = {
    Component.PREFILL: (Component.DECODE,),
    Component.DECODE: (Component.PREFILL, Component.DECODE),
    Component.COLOCATED: (),
}
"""Who dials whom to send KV."""


def services(plan: Blueprint) -> Iterator[Child]:
    """The clients' Service is called like the InferenceService; workers have headless ones."""
    ports: Json = [{
        "name": commands.HTTP_PORT_NAME, "port": plan.endpoint.port, "targetPort": commands.HTTP_PORT_NAME,
        "protocol": "TCP", "appProtocol": "http",
    }]  # fmt: skip
    spec: dict[str, Json] = {
        "type": plan.endpoint.service_type, "selector": role_selector(plan.name, Component.ROUTER), "ports": ports,
    }  # fmt: skip
    yield child(
        plan, SERVICE, component=Component.ROUTER, annotations=plan.endpoint.annotations, body={"spec": spec}
    )
    for pool in plan.workers:
        headless: dict[str, Json] = {
            "type": "ClusterIP",
            "clusterIP": "None",
            "selector": role_selector(plan.name, pool.component),
            "ports": [{
                "name": commands.GRPC_PORT_NAME, "port": commands.GRPC_PORT, "targetPort": commands.GRPC_PORT_NAME,
                "protocol": "TCP",
            }],
        }  # fmt: skip
        yield child(plan, SERVICE, pool.component.value, component=pool.component, body={"spec": headless})


def routes(plan: Blueprint) -> Iterator[Child]:
    """Ways in from outside the cluster."""
    endpoint = plan.endpoint
    if endpoint.ingress:
        yield child(
            plan, INGRESS, component=Component.ROUTER, annotations=endpoint.ingress_annotations,
            body={"spec": endpoint.ingress},
        )  # fmt: skip
    if endpoint.http_route:
        backend: Object = {"group": "", "kind": "Service", "name": child_name(plan.name), "port": endpoint.port}
        rules: Json = [{"backendRefs": [{**backend, "weight": 1}], "matches": [_any_path()]}]
        spec = {**endpoint.http_route, "rules": rules}
        yield child(plan, HTTP_ROUTE, component=Component.ROUTER, body={"spec": spec})


def _any_path() -> Object:
    return {"path": {"type": "PathPrefix", "value": "/"}}


def policies(plan: Blueprint) -> Iterator[Child]:
    everything: Json = {
        "podSelector": {"matchLabels": {SERVICE_LABEL: label_value(plan.name)}},
        "policyTypes": ["Ingress", "Egress"],
    }
    yield child(plan, NETWORK_POLICY, "deny", body={"spec": everything})
    yield _policy(plan, Component.ROUTER, ingress=[_rule("from", [], commands.HTTP_PORT)], egress=_router_egress(plan))
    for pool in plan.workers:
        yield _policy(plan, pool.component, ingress=_worker_ingress(plan, pool), egress=_worker_egress(plan, pool))


def _worker_ingress(plan: Blueprint, pool: Pool) -> list[Json]:
    rules: list[Json] = [
        _rule("from", [_pods(plan, Component.ROUTER)], commands.GRPC_PORT),
        _rule("from", [{"namespaceSelector": {}}], commands.METRICS_PORT),
    ]
    senders = [other for other in plan.workers if pool.component in _SENDS_TO[other.component]]
    return [*rules, *_kv(plan, "from", senders), *_store(plan, "from")]


def _worker_egress(plan: Blueprint, pool: Pool) -> list[Json]:
    receivers = [other for other in plan.workers if other.component in _SENDS_TO[pool.component]]
    return [_dns(), *_model_server(plan), *_collector(plan), *_kv(plan, "to", receivers), *_store(plan, "to")]


def _kv(plan: Blueprint, side: str, others: Sequence[Pool]) -> list[Json]:
    peers = [_pods(plan, other.component) for other in others]
    if not peers:
        return []
    return [_any_port(side, peers) if plan.any_peer_port else _rule(side, peers, commands.PEER_PORT)]


def _store(plan: Blueprint, side: str) -> list[Json]:
    """A Mooncake store: its master is known by a name, which no policy can; its parts listen where they like."""
    if plan.tiers is None or not plan.tiers.mooncake_master:
        return []
    parts = [_any_port(side, [_pods(plan, pool.component) for pool in plan.workers])]
    return parts if side == "from" else [_rule("to", [], plan.tiers.mooncake_port), *parts]


def _router_egress(plan: Blueprint) -> list[Json]:
    workers: list[Json] = [_pods(plan, pool.component) for pool in plan.workers]
    rules = [_dns(), *_model_server(plan), *_collector(plan), _rule("to", workers, commands.GRPC_PORT)]
    if plan.api_servers:
        for port in sorted({port for _, port in plan.api_servers}):
            blocks: list[Json] = [_address(ip) for ip, own in plan.api_servers if own == port]
            rules.append(_rule("to", blocks, port))
    else:
        rules.append(_rule("to", [], *_API_PORTS))
    return rules


def _policy(plan: Blueprint, component: Component, *, ingress: list[Json], egress: list[Json]) -> Child:
    spec: Json = {
        "podSelector": {"matchLabels": role_selector(plan.name, component)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return child(plan, NETWORK_POLICY, component.value, component=component, body={"spec": spec})


def _rule(side: str, peers: Sequence[Json], *ports: int) -> Json:
    """`side` is "from" or "to"; no peers = anyone."""
    entry: dict[str, Json] = {"ports": [{"protocol": "TCP", "port": port} for port in ports]}
    if peers:
        entry[side] = peers
    return entry


def _any_port(side: str, peers: Sequence[Json]) -> Json:
    return {"ports": [{"protocol": "TCP"}], side: list(peers)}


def _pods(plan: Blueprint, component: Component) -> Json:
    return {"podSelector": {"matchLabels": role_selector(plan.name, component)}}


def _dns() -> Json:
    """To any address: node-local caches and host-network resolvers have no pod to select."""
    return {"ports": [{"protocol": "UDP", "port": _DNS_PORT}, {"protocol": "TCP", "port": _DNS_PORT}]}


def _model_server(plan: Blueprint) -> list[Json]:
    if not plan.model.downloaded:
        return []
    if not plan.model.endpoint:
        return [_rule("to", [], _HTTPS_PORT)]
    return [_rule("to", [], _port_of(plan.model.endpoint))]


def _collector(plan: Blueprint) -> list[Json]:
    return [_rule("to", [], _port_of(plan.collector))] if plan.collector else []


def _port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (80 if parts.scheme == "http" else _HTTPS_PORT)


def _address(ip: str) -> Json:
    return {"ipBlock": {"cidr": f"{ip}/{ip_address(ip).max_prefixlen}"}}
