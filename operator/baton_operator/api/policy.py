"""How a service behaves: how KV travels, how a new revision replaces the old one, and how fast answers should be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton_operator.api.base import IntOrPercent, Strict
from baton_operator.api.rules import rule

Wire = Literal["auto", "nixl", "mooncake", "tcp", "shm"]


class Transport(Strict):
    """How KV pages travel from prefill to decode."""

    wire: Annotated[
        Wire, Field(description="auto = the fastest that both ends prove to have; shm is for one machine only")
    ] = "auto"


class Tracing(Strict):
    """Spans of every request, from the router and the workers, to a collector of OpenTelemetry."""

    endpoint: Annotated[
        str,
        Field(
            pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[!-~]*)?$", max_length=512,
            description="of the collector's OTLP over HTTP, like http://collector.monitoring:4318",
        ),
    ]  # fmt: skip


class Rollout(Strict):
    """How many workers of each role may be on top of, or missing from, the wanted number while a revision changes."""

    max_surge: Annotated[IntOrPercent, Field(description="workers on top, as a number or a part like 25%")] = 1
    max_unavailable: Annotated[IntOrPercent, Field(description="workers missing, as a number or a part like 25%")] = 0

    @rule(
        cel="!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])",
        message="maxSurge and maxUnavailable are both 0, so no worker could ever be replaced; raise one of them",
    )
    def can_move(self) -> bool:
        return not (_is_zero(self.max_surge) and _is_zero(self.max_unavailable))


class Slo(Strict):
    """What an answer should feel like; autoscaling and alerts work towards it."""

    ttft_ms: Annotated[int | None, Field(ge=1, le=600000, description="time to first token, ms")] = None
    itl_ms: Annotated[int | None, Field(ge=1, le=60000, description="time between tokens, ms")] = None
    percentile: Annotated[int, Field(ge=50, le=99, description="part of the requests that must meet it, %")] = 90

    @rule(
        cel="has(self.ttftMs) || has(self.itlMs)",
        message="slo without a target says nothing; set ttftMs, itlMs or both, or remove slo",
    )
    def has_a_target(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None


def _is_zero(value: int | str) -> bool:
    return value in (0, "0%")
