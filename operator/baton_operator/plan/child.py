"""One object that a service needs, and how its head is made: owner, labels, name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton_common.kube.kinds import Kind
from baton_common.kube.objects import Json, Object, digest, mapping
from baton_operator.kinds import INFERENCE_SERVICE
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.labels import (
    APPLIED_ANNOTATION,
    SERVICE_ANNOTATION,
    Component,
    role_labels,
    service_labels,
)
from baton_operator.plan.names import child_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """`manifest` is all that the operator owns of the object, in the form that server-side apply takes."""

    kind: Kind
    namespace: str
    name: str
    manifest: Object

    @property
    def key(self) -> tuple[str, str]:
        """(resource, name): unique among the children of one service."""
        return self.kind.resource, self.name

    @property
    def applied_hash(self) -> str:
        """Names the whole manifest; lies in an annotation of it."""
        value = mapping(self.manifest, "metadata", "annotations").get(APPLIED_ANNOTATION)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleTo:
    """Set a Deployment's replicas through /scale: they are an autoscaler's, and out of bounds."""

    name: str
    replicas: int


def child(
    plan: Blueprint,
    kind: Kind,
    *suffix: str,
    body: Mapping[str, Json],
    component: Component | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Child:
    """`body` is the object without its head, such as {"spec": ...}. `component`: whom it belongs to, if one."""
    name = child_name(plan.name, *suffix)
    labels = service_labels(plan.name) if component is None else role_labels(plan.name, component)
    notes = {SERVICE_ANNOTATION: plan.name, **(annotations or {})}
    metadata: dict[str, Json] = {
        "name": name,
        "namespace": plan.namespace,
        "labels": labels,
        "annotations": notes,
        "ownerReferences": [owner_reference(plan)],
    }
    whole: dict[str, Json] = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **body}
    metadata["annotations"] = {**notes, APPLIED_ANNOTATION: digest(whole, length=16)}
    return Child(kind=kind, namespace=plan.namespace, name=name, manifest=whole)


def owner_reference(plan: Blueprint) -> Object:
    return {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.kind,
        "name": plan.name,
        "uid": plan.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
