"""The CRDs and the editors' JSON schemas, made from the API models: `python -m baton_operator.crd [FOLDER]`.

Invariant: what this writes is what lies in crds/; a test compares them. A CRD schema is structural: no $ref, a type on
every level, `null` is not a value, and whatever is not declared is refused. Knows no rule and no field by name; a model
that it cannot put into such a schema raises NotStructural.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from baton_operator.api import GROUP, VERSION, AcceleratorProfile, InferenceService, Strict

Schema: TypeAlias = "dict[str, Value]"
Value: TypeAlias = "bool | int | float | str | list[Value] | Schema | None"

FOLDER = Path(__file__).resolve().parents[2] / "crds"
_HEADER = "# Generated from the models in baton_operator.api by `python -m baton_operator.crd`; do not edit.\n"
_KEPT = (
    "type", "format", "enum", "default", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems",
    "maxItems", "minProperties", "maxProperties", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
)  # fmt: skip
_METADATA: Schema = {"type": "object", "properties": {}}
_READY = '.status.conditions[?(@.type=="Ready")]'


class NotStructural(Exception):
    """A model says something that a CRD schema cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of `kubectl get`; wide ones show with `-o wide`."""

    name: str
    path: str
    type: str = "string"
    description: str = ""
    wide: bool = False

    def as_entry(self) -> Schema:
        entry: Schema = {"name": self.name, "type": self.type, "jsonPath": self.path}
        if self.description:
            entry["description"] = self.description
        if self.wide:
            entry["priority"] = 1
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind as the API server serves it."""

    model: type[Strict]
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    has_status: bool
    columns: tuple[Column, ...]

    @property
    def kind(self) -> str:
        return self.model.__name__


AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date")
RESOURCES = (
    Resource(
        model=InferenceService, plural=InferenceService.plural, short_names=("isvc",), namespaced=True, has_status=True,
        columns=(
            Column(name="Ready", path=f"{_READY}.status"),
            Column(name="Prefill", path=".status.roles.prefill.summary", description="ready/desired workers"),
            Column(name="Decode", path=".status.roles.decode.summary", description="ready/desired workers"),
            Column(name="Revision", path=".status.updatedRevision", description="of the present spec"),
            Column(name="URL", path=".status.url"),
            AGE,
            Column(name="Reason", path=f"{_READY}.reason", description="why it is not ready", wide=True),
            Column(name="Colocated", path=".status.roles.colocated.summary", wide=True),
            Column(name="Router", path=".status.roles.router.summary", wide=True),
            Column(name="Model", path=".spec.model.uri", wide=True),
        ),
    ),
    Resource(
        model=AcceleratorProfile, plural=AcceleratorProfile.plural, short_names=("accprof",), namespaced=False,
        has_status=False,
        columns=(
            Column(name="Device", path=".spec.device"),
            Column(name="GPU", path=".spec.gpu.resource"),
            Column(name="Per-Node", path=".spec.gpu.perNode", type="integer"),
            Column(name="RDMA", path=".spec.rdma.resource"),
            Column(name="Arch", path=".spec.arch"),
            AGE,
        ),
    ),
)  # fmt: skip


def custom_resource(resource: Resource) -> Schema:
    """The CustomResourceDefinition."""
    version: Schema = {
        "name": VERSION, "served": True, "storage": True,
        "additionalPrinterColumns": [column.as_entry() for column in resource.columns],
        "schema": {"openAPIV3Schema": structural(resource.model)},
    }  # fmt: skip
    if resource.has_status:
        version["subresources"] = {"status": {}}
    names: Schema = {
        "kind": resource.kind, "listKind": f"{resource.kind}List", "plural": resource.plural,
        "singular": resource.kind.lower(), "shortNames": list(resource.short_names), "categories": ["baton"],
    }  # fmt: skip
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}"},
        "spec": {
            "group": GROUP, "names": names, "scope": "Namespaced" if resource.namespaced else "Cluster",
            "versions": [version],
        },
    }  # fmt: skip


def editor_schema(resource: Resource) -> Schema:
    """JSON Schema for editors: the same fields; rules that compare fields are beyond it."""
    made = _without_rules(resource.model.model_json_schema(by_alias=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def structural(model: type[Strict]) -> Schema:
    """The model as a structural schema. Raises NotStructural."""
    whole = model.model_json_schema(by_alias=True)
    fields = _mapping(whole["properties"])
    # The API server has its own schema of these three.
    fields.update(apiVersion={"type": "string"}, kind={"type": "string"}, metadata=_METADATA)
    whole["required"] = ["metadata", "spec"]
    return _structural(whole, whole.get("$defs", {}), model.__name__)


def files() -> dict[str, str]:
    """Every generated file, by its path below the folder."""
    made: dict[str, str] = {}
    for resource in RESOURCES:
        text = yaml.dump(custom_resource(resource), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
        made[f"{GROUP}_{resource.plural}.yaml"] = _HEADER + text
        schema = json.dumps(editor_schema(resource), indent=2, ensure_ascii=False)
        made[f"schema/{resource.kind.lower()}_{VERSION}.json"] = schema + "\n"
    return made


def write(folder: Path) -> None:
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _structural(schema: Schema, definitions: Mapping[str, Schema], where: str) -> Schema:
    schema = _resolved(schema, definitions, where)
    made: Schema = {"description": " ".join(str(schema["description"]).split())} if "description" in schema else {}
    choices = _choices(schema)
    if choices:  # integer or string
        made["x-kubernetes-int-or-string"] = True
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if {str(choice.get("type")) for choice in choices} != {"integer", "string"}:
            raise NotStructural(f"{where}: a choice that is not integer or string")
        schema = {**schema, **{key: value for choice in choices for key, value in choice.items() if key != "type"}}
    elif "type" not in schema:
        raise NotStructural(f"{where}: no type")
    made.update({key: schema[key] for key in _KEPT if schema.get(key) is not None})
    if "x-kubernetes-preserve-unknown-fields" in schema:
        made["x-kubernetes-preserve-unknown-fields"] = True
    elif schema.get("type") == "object":
        _object(schema, definitions, where, made)
    if "items" in schema:
        made["items"] = _structural(_mapping(schema["items"]), definitions, f"{where}[]")
    if "x-kubernetes-validations" in schema:
        made["x-kubernetes-validations"] = schema["x-kubernetes-validations"]
    return made


def _object(schema: Schema, definitions: Mapping[str, Schema], where: str, made: Schema) -> None:
    """Fields of a model, or the values of a map."""
    if "properties" not in schema:
        values = schema.get("additionalProperties")
        if not isinstance(values, dict):
            raise NotStructural(f"{where}: an object without fields")
        made["additionalProperties"] = _structural(values, definitions, f"{where}{{}}")
        return
    required = _strings(schema.get("required", []))
    properties: Schema = {}
    for name, value in _mapping(schema["properties"]).items():
        field = _mapping(value)
        inner = _structural(field, definitions, f"{where}.{name}")
        made_by_default = name not in required and "default" not in field
        if made_by_default and "properties" in inner:
            inner["default"] = _defaults(inner)
        properties[name] = inner
    if properties:
        made["properties"] = properties
    if required:
        made["required"] = list(required)


def _defaults(schema: Schema) -> Schema:
    """Of a model in which nothing is written. The API server asks its rules before it fills in those inside."""
    fields = _mapping(schema["properties"]).items()
    return {name: field["default"] for name, field in fields if isinstance(field, dict) and "default" in field}


def _resolved(schema: Schema, definitions: Mapping[str, Schema], where: str) -> Schema:
    """Without $ref, and without `null` as a choice: an absent field is absent."""
    while "$ref" in schema or "anyOf" in schema:
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
        if "$ref" in schema:
            inner = definitions[str(schema["$ref"]).rpartition("/")[2]]
        else:
            kept = [choice for choice in _choices(schema) if choice.get("type") != "null"]
            if len(kept) != 1:
                return {**beside, "anyOf": [_resolved(choice, definitions, where) for choice in kept]}
            inner = kept[0]
        schema = {**inner, **beside}
    return {**schema, "enum": [schema["const"]]} if "const" in schema else schema


def _choices(schema: Schema) -> list[Schema]:
    found = schema.get("anyOf", [])
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _mapping(value: Value) -> Schema:
    if not isinstance(value, dict):
        raise NotStructural(f"not a mapping: {value!r}")
    return value


def _strings(value: Value) -> Sequence[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _without_rules(value: Value) -> Schema:
    """What a JSON schema does not know, and the titles, which only repeat the names."""

    def cleaned(part: Value) -> Value:
        if isinstance(part, list):
            return [cleaned(item) for item in part]
        if not isinstance(part, dict):
            return part
        dropped = {key for key, item in part.items() if key == "title" and isinstance(item, str)}
        return {key: cleaned(item) for key, item in part.items() if key not in dropped and not key.startswith("x-k")}

    return _mapping(cleaned(value))


class _Plain(yaml.SafeDumper):
    """Without anchors: equal parts are written out."""

    def ignore_aliases(self, data: object) -> bool:
        return True


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
