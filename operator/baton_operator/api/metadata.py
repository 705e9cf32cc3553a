"""The metadata of an object, whole as the API server has it, and the one way from a mapping to a checked object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import Field, JsonValue, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from baton_operator.api.base import Strict
from baton_operator.api.rules import Place, violations

_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
ObjectList = Annotated[list[dict[str, JsonValue]], Field(default_factory=list)]


class Metadata(Strict):
    """What a user writes stands first; the rest is the API server's."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: ObjectList
    generate_name: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    managed_fields: ObjectList
    self_link: str | None = None

    @property
    def names_a_service(self) -> bool:
        return len(self.name) <= 63 and _SERVICE_NAME.fullmatch(self.name) is not None


M = TypeVar("M", bound=Strict)


def checked(model: type[M], written: Mapping[str, object], place: Place) -> M:
    """Schema and rules. Raises pydantic.ValidationError with every fault and its path."""
    made = model.model_validate(written)
    if found := violations(made, place):
        raise ValidationError.from_exception_data(
            model.__name__,
            [
                InitErrorDetails(
                    type=PydanticCustomError("rule", "{message}", {"message": item.message, "rule": item.rule}),
                    loc=item.path, input=None,
                )
                for item in found
            ],
        )  # fmt: skip
    return made
