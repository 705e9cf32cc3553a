"""What every API model is made of: strictness, naming, and the field types that several nouns share.

Invariants: a field that is not declared is an error; names are camelCase outside and snake_case inside; `null` means
absent, as it does to the API server; every string, list and map has a bound, because the cost of a CEL rule is
estimated from bounds. Knows no noun of the API and nothing of Kubernetes beyond the shape of its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from baton_operator.api.rules import Rule, rules_of

GROUP = "serving.baton.dev"
VERSION = "v1alpha1"
API_VERSION = "serving.baton.dev/v1alpha1"
ApiVersion = Literal["serving.baton.dev/v1alpha1"]


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class Strict(BaseModel):
    """Frozen, camelCase outside, and no room for a misspelt field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=to_camel, populate_by_name=True,
        protected_namespaces=(), ignored_types=(Rule,),
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        if rules := [rule.as_validation() for rule in rules_of(cls) if rule.in_crd]:
            handler.resolve_ref_schema(schema)["x-kubernetes-validations"] = rules
        return schema


def _integer_or_text(what: str, pattern: str, *, most: int, longest: int) -> tuple[PlainValidator, WithJsonSchema]:
    """For a value that Kubernetes takes as a number or as text. A union would report each fault twice."""
    form = re.compile(pattern)

    def check(value: object) -> int | str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
            return value
        if isinstance(value, str) and len(value) <= longest and form.fullmatch(value):
            return value
        raise ValueError(f"write {what}")

    schema: JsonSchemaValue = {
        "description": what,
        "anyOf": [
            {"type": "integer", "minimum": 0, "maximum": most},
            {"type": "string", "pattern": pattern, "maxLength": longest},
        ],
    }
    return PlainValidator(check), WithJsonSchema(schema)


# Name of an object of another kind: a Secret, a claim, a profile.
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]
# A resource as the kubelet counts it, like nvidia.com/gpu or rdma/ib.
ResourceName = Annotated[
    str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=253)
]
Hostname = Annotated[
    str, Field(pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0, le=1024)]
ShortText = Annotated[str, Field(max_length=1024)]
# 4, "4", "500m", "16Gi": an amount of a resource.
Quantity = Annotated[
    int | str,
    *_integer_or_text(
        "an amount like 4, 500m or 16Gi", r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", most=2**60, longest=32
    ),
]
# 2 or "25%": how many pods, or what part of them.
IntOrPercent = Annotated[
    int | str,
    *_integer_or_text("a number of pods, or a part of them like 25%", "^(100|[1-9]?[0-9])%$", most=1024, longest=4),
]
LabelMap = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)]
AnnotationMap = Annotated[dict[str, Annotated[str, Field(max_length=16384)]], Field(max_length=64)]
