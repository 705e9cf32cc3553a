"""What tells a Prometheus operator to scrape the service: the router through its Service, the workers pod by pod."""

from __future__ import annotations

from collections.abc import Iterator

from baton_common.kube.objects import Json
from baton_operator.kinds import POD_MONITOR, SERVICE_MONITOR
from baton_operator.plan import commands
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.child import Child, child
from baton_operator.plan.labels import ROLE_LABEL, SERVICE_LABEL, Component, role_selector
from baton_operator.plan.names import label_value

_INTERVAL = "15s"
_TARGET_LABELS = [SERVICE_LABEL, ROLE_LABEL]


def monitors(plan: Blueprint) -> Iterator[Child]:
    router: Json = {
        "selector": {"matchLabels": role_selector(plan.name, Component.ROUTER)},
        "endpoints": [{"port": commands.HTTP_PORT_NAME, "path": "/metrics", "interval": _INTERVAL}],
        "targetLabels": _TARGET_LABELS,
    }
    yield child(plan, SERVICE_MONITOR, "router", component=Component.ROUTER, body={"spec": router})
    roles: Json = {"key": ROLE_LABEL, "operator": "In", "values": [pool.component.value for pool in plan.workers]}
    workers: Json = {
        "selector": {"matchLabels": {SERVICE_LABEL: label_value(plan.name)}, "matchExpressions": [roles]},
        "podMetricsEndpoints": [{"port": commands.METRICS_PORT_NAME, "path": "/metrics", "interval": _INTERVAL}],
        "podTargetLabels": _TARGET_LABELS,
    }
    yield child(plan, POD_MONITOR, "workers", body={"spec": workers})
