"""Keys and values by which objects of a service are recognised. The one place where they are spelt."""

from __future__ import annotations

from enum import StrEnum

from baton_operator.plan.names import label_value

PREFIX = "serving.baton.dev"
MANAGER = "baton-operator"
"""Field manager of everything the operator applies."""

FINALIZER = f"{PREFIX}/cleanup"
SERVICE_LABEL = f"{PREFIX}/service"
ROLE_LABEL = f"{PREFIX}/role"
REVISION_LABEL = f"{PREFIX}/revision"
KV_REVISION_LABEL = f"{PREFIX}/kv-revision"
SERVICE_ANNOTATION = f"{PREFIX}/service-name"
APPLIED_ANNOTATION = f"{PREFIX}/applied-hash"
SETTINGS_ANNOTATION = f"{PREFIX}/settings-hash"


class Component(StrEnum):
    """What the pods of one Deployment do."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    ROUTER = "router"


WORKERS = (Component.PREFILL, Component.DECODE, Component.COLOCATED)


def service_labels(service: str) -> dict[str, str]:
    """On every child of a service."""
    return {
        "app.kubernetes.io/name": "baton",
        "app.kubernetes.io/instance": label_value(service),
        "app.kubernetes.io/managed-by": MANAGER,
        SERVICE_LABEL: label_value(service),
    }


def role_labels(service: str, role: Component) -> dict[str, str]:
    """On every child that belongs to one role."""
    return {**service_labels(service), "app.kubernetes.io/component": role.value, ROLE_LABEL: role.value}


def role_selector(service: str, role: Component) -> dict[str, str]:
    """Finds the pods of one role; immutable in a Deployment, so as small as can be."""
    return {SERVICE_LABEL: label_value(service), ROLE_LABEL: role.value}


def service_selector(service: str) -> str:
    """Label selector of all children of a service, as the API takes it."""
    return f"{SERVICE_LABEL}={label_value(service)}"
