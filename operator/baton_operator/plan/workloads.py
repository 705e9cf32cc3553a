"""Deployments and what keeps them available: budgets for voluntary disruptions."""

from __future__ import annotations

from collections.abc import Iterator

from baton_common.kube.objects import Json
from baton_operator.kinds import DEPLOYMENT, DISRUPTION_BUDGET
from baton_operator.plan.blueprint import Blueprint, Pool
from baton_operator.plan.child import Child, child
from baton_operator.plan.labels import Component, role_selector
from baton_operator.plan.pods import pod_template

_PROGRESS_S = 1800  # a new pod that is not ready after this long counts as stuck; large models load for many minutes
_OLD_REVISIONS = 3


def workloads(plan: Blueprint) -> Iterator[Child]:
    for pool in plan.pools:
        yield _deployment(plan, pool)
        yield _budget(plan, pool)


def _deployment(plan: Blueprint, pool: Pool) -> Child:
    is_router = pool.component is Component.ROUTER
    spec: dict[str, Json] = {
        "selector": {"matchLabels": role_selector(plan.name, pool.component)},
        "template": pod_template(plan, pool),
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {
                "maxSurge": 1 if is_router else plan.max_surge,
                "maxUnavailable": 0 if is_router else plan.max_unavailable,
            },
        },
        "progressDeadlineSeconds": _PROGRESS_S,
        "revisionHistoryLimit": _OLD_REVISIONS,
    }
    if pool.scale.fixed is not None:
        spec["replicas"] = pool.scale.fixed  # otherwise the field belongs to an autoscaler
    return child(plan, DEPLOYMENT, pool.component.value, component=pool.component, body={"spec": spec})


def _budget(plan: Blueprint, pool: Pool) -> Child:
    """One at a time: follows every scale, and a single pod can still be moved off its node."""
    spec: Json = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": role_selector(plan.name, pool.component)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return child(plan, DISRUPTION_BUDGET, pool.component.value, component=pool.component, body={"spec": spec})
