"""Who the pods are and what they may ask of the API: workers nothing; the router sees its workers come and go, and says
of each pod whether it is registered and hands over KV.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton_common.kube.objects import Json
from baton_operator.kinds import CONFIG_MAP, ROLE, ROLE_BINDING, SERVICE_ACCOUNT
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.child import Child, child
from baton_operator.plan.commands import SETTINGS_FILE
from baton_operator.plan.labels import Component
from baton_operator.plan.names import child_name
from baton_operator.plan.settings import settings_text


def identities(plan: Blueprint) -> Iterator[Child]:
    yield child(plan, SERVICE_ACCOUNT, "worker", body={"automountServiceAccountToken": False})
    yield child(
        plan, SERVICE_ACCOUNT, "router", component=Component.ROUTER, body={"automountServiceAccountToken": True}
    )
    rules: Json = [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]},
    ]
    yield child(plan, ROLE, "router", component=Component.ROUTER, body={"rules": rules})
    name = child_name(plan.name, "router")
    role: Json = {"apiGroup": ROLE.group, "kind": ROLE.kind, "name": name}
    subjects: Json = [{"kind": SERVICE_ACCOUNT.kind, "name": name, "namespace": plan.namespace}]
    yield child(
        plan, ROLE_BINDING, "router", component=Component.ROUTER, body={"roleRef": role, "subjects": subjects}
    )


def settings(plan: Blueprint) -> Child:
    return child(plan, CONFIG_MAP, "settings", body={"data": {SETTINGS_FILE: settings_text(plan)}})
