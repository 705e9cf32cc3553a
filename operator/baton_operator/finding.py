"""One condition of a service without its times."""

from __future__ import annotations

from dataclasses import dataclass

from baton_operator.api.status import ConditionStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`reason` is one word for programs, `message` says what is the matter and what to look at or do next."""

    status: ConditionStatus
    reason: str
    message: str = ""
