"""The door of planning: all objects of one service, and what has to happen to an autoscaled number of pods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from baton_common.kube.kinds import Kind
from baton_common.kube.objects import digest, mapping
from baton_operator.kinds import CHILD_KINDS, OPTIONAL_KINDS
from baton_operator.plan.access import identities, settings
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.child import Child, ScaleTo
from baton_operator.plan.labels import Component
from baton_operator.plan.monitors import monitors
from baton_operator.plan.names import child_name
from baton_operator.plan.network import policies, routes, services
from baton_operator.plan.pods import revision_of
from baton_operator.plan.workloads import workloads


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """`children` in the order of creation. `revisions`: of the pods of each component, as in their label."""

    children: tuple[Child, ...]
    revisions: Mapping[Component, str]
    revision: str  # of all workers together


def desired(plan: Blueprint, *, served: Collection[Kind]) -> Desired:
    """`served`: the optional kinds that this cluster has."""
    made = [
        *identities(plan), settings(plan), *services(plan), *policies(plan), *workloads(plan), *routes(plan),
        *monitors(plan),
    ]  # fmt: skip
    order = {kind: index for index, kind in enumerate(CHILD_KINDS)}
    children = sorted(
        (item for item in made if item.kind not in OPTIONAL_KINDS or item.kind in served),
        key=lambda item: order[item.kind],
    )
    templates = {
        item.name: mapping(item.manifest, "spec", "template") for item in children if item.kind.kind == "Deployment"
    }
    revisions = {
        pool.component: revision_of(templates[child_name(plan.name, pool.component.value)]) for pool in plan.pools
    }
    workers = {component.value: revision for component, revision in revisions.items() if component in _WORKERS}
    return Desired(children=tuple(children), revisions=revisions, revision=digest(workers))


_WORKERS = (Component.PREFILL, Component.DECODE, Component.COLOCATED)


def scale_steps(plan: Blueprint, replicas: Mapping[Component, int]) -> tuple[ScaleTo, ...]:
    """`replicas`: what the Deployments that exist ask for. Acts only out of bounds, so no autoscaler is fought."""
    steps: list[ScaleTo] = []
    for pool in plan.workers:
        asked = replicas.get(pool.component)
        if pool.scale.fixed is None and asked is not None and pool.scale.clamp(asked) != asked:
            name = child_name(plan.name, pool.component.value)
            steps.append(ScaleTo(name=name, replicas=pool.scale.clamp(asked)))
    return tuple(steps)
