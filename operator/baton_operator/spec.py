"""InferenceService, serving.baton.dev/v1alpha1: what a user writes to have a model served.

The same object describes a service on one machine (`baton up service.yaml`) and, later, in a cluster. It is strict: a
field that is not here is an error, never ignored. Field names are camelCase in YAML, snake_case in Python. Knows
nothing of files, processes or Kubernetes; reading YAML with line numbers is `document.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "serving.baton.dev/v1alpha1"
KIND = "InferenceService"

_HUB = re.compile(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE = re.compile(r"file://.+")

Replicas = Annotated[int, Field(ge=0, le=1024)]
Dtype = Literal["auto", "float32", "bfloat16"]
Wire = Literal["auto", "shm", "tcp"]


class Strict(BaseModel):
    """Frozen, camelCase outside, and no room for a misspelt field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=to_camel, populate_by_name=True,
        protected_namespaces=(),
    )


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Model(Strict):
    """Which weights, and in which number format they are computed."""

    uri: Annotated[str, Field(description="file:///folder, file://./folder beside the file, or hf://owner/name@revision")]
    served_name: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="`model` in API requests; default: the last part of the uri"),
    ] = None
    dtype: Annotated[Dtype, Field(description="of weights and activations; auto = as the checkpoint says")] = "auto"
    kv_dtype: Annotated[Dtype, Field(description="of the KV cache; auto = as dtype")] = "auto"
    context_tokens: Annotated[
        int | None, Field(ge=16, description="longest prompt + answer; default: what the checkpoint supports")
    ] = None

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        if not (_HUB.fullmatch(uri) or _FILE.fullmatch(uri)):
            raise ValueError("use file:///folder, file://./folder or hf://owner/name (with @revision if you need one)")
        return uri


class Pool(Strict):
    """Workers of one role."""

    replicas: Replicas = 1


class NoPool(Strict):
    """Workers of a role that is off unless asked for."""

    replicas: Replicas = 0


class Transport(Strict):
    """How KV pages travel from prefill to decode."""

    wire: Annotated[Wire, Field(description="auto = shared memory on one host, else tcp")] = "auto"


class Router(Strict):
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class Spec(Strict):
    model: Model
    prefill: Pool = Field(default_factory=Pool)
    decode: Pool = Field(default_factory=Pool)
    colocated: NoPool = Field(default_factory=NoPool, description="workers that do both roles themselves")
    transport: Transport = Field(default_factory=Transport)
    router: Router = Field(default_factory=Router)

    @model_validator(mode="after")
    def _can_serve(self) -> Self:
        prefill, decode, both = self.prefill.replicas, self.decode.replicas, self.colocated.replicas
        if both == 0 and (prefill == 0 or decode == 0):
            raise ValueError(
                f"prefill.replicas is {prefill}, decode.replicas is {decode}: have one of each, or colocated.replicas"
            )
        if (prefill == 0) != (decode == 0):
            raise ValueError("prefill workers without decode workers, or the other way round, would never be used")
        return self


class InferenceService(Strict):
    """One model behind one endpoint."""

    api_version: Literal["serving.baton.dev/v1alpha1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: Spec
