"""From a service as it is written to its blueprint, and what of the things it names is not there.

Two ask: every pass of the reconciler, and admission before anything is stored; so both say the same words. Reads only.
`Refused.lasting` tells them apart: what nothing but a change of the service itself can heal.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pydantic import ValidationError

from baton_common.errors import BatonError
from baton_common.kube.client import KubeClient
from baton_common.kube.kinds import Kind
from baton_common.kube.objects import Object, text
from baton_operator.api import AcceleratorProfile, ConditionType, InferenceService, Unplaceable
from baton_operator.finding import Finding
from baton_operator.kinds import ACCELERATOR_PROFILE, CLAIM, HTTP_ROUTE, SECRET
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.intake import Platform, blueprint
from baton_operator.plan.limits import kv_mismatch, unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """What planning takes from the cluster besides the service: looked up rarely, by `main`."""

    platform: Platform
    served: frozenset[Kind]


class Refused(BatonError):
    """The service cannot be planned as it is; becomes the Accepted condition, or the answer to `kubectl apply`."""

    def __init__(self, reason: str, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting


def parsed(service: Object) -> InferenceService:
    """Raises Refused."""
    try:
        return InferenceService.parse({**service, "status": None})
    except ValidationError as error:
        raise Refused("InvalidSpec", f"{_first_fault(error)}; correct the service", lasting=True) from None


async def planned(client: KubeClient, service: InferenceService, platform: Platform) -> Blueprint:
    """Raises Refused."""
    if words := unsupported(service.spec):
        raise Refused("NotSupported", words, lasting=True)
    profile = await _profile(client, service.spec.profile)
    try:
        plan = blueprint(service, profile, platform)
    except Unplaceable as error:
        raise Refused("Unplaceable", error.message, lasting=True) from None
    if words := kv_mismatch(plan):
        raise Refused("KvMismatch", words, lasting=True)
    return plan


async def served_kinds(client: KubeClient, plan: Blueprint, facts: ClusterFacts) -> frozenset[Kind]:
    """The facts may be a resync old; a service that waits for a kind wants to know now."""
    if plan.endpoint.http_route and HTTP_ROUTE not in facts.served and await client.serves(HTTP_ROUTE):
        return facts.served | {HTTP_ROUTE}
    return facts.served


async def missing(
    client: KubeClient, plan: Blueprint, served: Collection[Kind]
) -> list[tuple[ConditionType, Finding]]:
    """Things that the user makes and pods wait for without a word in their status, with the condition that fails."""
    model, endpoint = plan.model, plan.endpoint
    needs = (
        (ConditionType.MODEL_READY, SECRET, model.secret, "spec.model.credentialsSecret"),
        (ConditionType.MODEL_READY, CLAIM, model.claim, "spec.model.uri"),
        (ConditionType.MODEL_READY, CLAIM, model.cache_claim, "spec.model.cacheClaim"),
        (ConditionType.ROUTER_READY, SECRET, endpoint.api_keys_secret, "spec.router.apiKeysSecret"),
        (ConditionType.ROUTER_READY, SECRET, endpoint.tls_secret, "spec.router.ingress.tlsSecret"),
    )
    found: list[tuple[ConditionType, Finding]] = []
    for condition, kind, name, where in needs:
        if name and not await client.exists(kind, plan.namespace, name):
            finding = Finding(
                status="False",
                reason="SecretNotFound" if kind is SECRET else "ClaimNotFound",
                message=f"no {kind.kind} {name} exists in namespace {plan.namespace}; create it, or change {where}",
            )
            found.append((condition, finding))
    if endpoint.http_route and HTTP_ROUTE not in served:
        finding = Finding(
            status="False", reason="KindNotServed",
            message=f"the cluster has no {HTTP_ROUTE.kind} of {HTTP_ROUTE.api_version}; install the Gateway API's "
            "CRDs, or remove spec.router.httpRoute",
        )  # fmt: skip
        found.append((ConditionType.ROUTER_READY, finding))
    return found


async def _profile(client: KubeClient, name: str) -> AcceleratorProfile:
    found = await client.get(ACCELERATOR_PROFILE, "", name)
    if found is None:
        others = [text(item, "metadata", "name") for item in await client.list(ACCELERATOR_PROFILE)]
        raise Refused(
            "ProfileNotFound",
            f"there is no AcceleratorProfile {name}; create it, or set spec.profile to one of: "
            f"{', '.join(sorted(others)) or '(none exists: install the profiles)'}",
        )
    try:
        return AcceleratorProfile.parse(dict(found))
    except ValidationError as error:
        raise Refused("ProfileInvalid", f"AcceleratorProfile {name}: {_first_fault(error)}; correct it") from None


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].removeprefix('Value error, ')}"
