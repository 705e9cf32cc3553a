"""What the operator tells about a service. Written by the operator alone, through the status subresource."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field

from baton_operator.api.base import ShortText, Strict

ConditionStatus = Literal["True", "False", "Unknown"]
Timestamp = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
Tally = Annotated[int, Field(ge=0)]


class ConditionType(StrEnum):
    """In the order in which they become true."""

    ACCEPTED = "Accepted"
    MODEL_READY = "ModelReady"
    PREFILL_READY = "PrefillReady"
    DECODE_READY = "DecodeReady"
    ROUTER_READY = "RouterReady"
    TRANSPORT_READY = "TransportReady"
    PROGRESSING = "Progressing"
    READY = "Ready"


class Condition(Strict):
    type: Literal[
        "Accepted", "ModelReady", "PrefillReady", "DecodeReady", "RouterReady", "TransportReady", "Progressing", "Ready"
    ]
    status: ConditionStatus
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    message: Annotated[str, Field(max_length=4096, description="what is the matter and what to do about it")] = ""
    last_transition_time: Timestamp
    observed_generation: Tally | None = None


class RoleStatus(Strict):
    """Pods of one role."""

    desired: Annotated[Tally, Field(description="pods asked for")] = 0
    updated: Annotated[Tally, Field(description="pods of the updated revision")] = 0
    ready: Annotated[Tally, Field(description="of those, the ready ones")] = 0
    routable: Annotated[Tally, Field(description="of those, the ones registered with a router")] = 0
    summary: Annotated[str, Field(max_length=32, description="ready/desired, for kubectl get")] = "0/0"
    selector: Annotated[ShortText | None, Field(description="label selector of the pods")] = None

    @classmethod
    def of(cls, *, desired: int, updated: int, ready: int, routable: int, selector: str | None = None) -> Self:
        return cls(
            desired=desired, updated=updated, ready=ready, routable=routable, summary=f"{ready}/{desired}",
            selector=selector,
        )  # fmt: skip


class RolesStatus(Strict):
    prefill: RoleStatus | None = None
    decode: RoleStatus | None = None
    colocated: RoleStatus | None = None
    router: RoleStatus | None = None


class ServiceStatus(Strict):
    observed_generation: Annotated[
        Tally | None, Field(description="the metadata.generation that the rest of the status speaks of")
    ] = None
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            description="each with status, reason, message and the time of its last change",
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = Field(default_factory=list)
    roles: RolesStatus | None = None
    url: Annotated[ShortText | None, Field(description="where clients reach the service")] = None
    current_revision: Annotated[ShortText | None, Field(description="the newest revision that was once ready")] = None
    updated_revision: Annotated[ShortText | None, Field(description="the revision of the present spec")] = None
