"""The generated files: they are the committed ones, structural, and say what the models say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from support.api_objects import rules_in_crds

from baton_operator.api import Strict
from baton_operator.crd import FOLDER, RESOURCES, NotStructural, Resource, custom_resource, editor_schema, files

Schema = dict[str, Any]


def schema_of(resource: Resource) -> Schema:
    crd: Any = custom_resource(resource)
    found: Schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def below(schema: Schema, where: str = "") -> Iterator[tuple[str, Schema]]:
    yield where, schema
    for name, inner in schema.get("properties", {}).items():
        yield from below(inner, f"{where}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from below(schema[key], f"{where}[]")


def test_the_committed_files_are_the_generated_ones() -> None:
    committed = {str(file.relative_to(FOLDER)): file.read_text() for file in FOLDER.rglob("*") if file.is_file()}
    assert committed == files(), "run python -m baton_operator.crd"


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_every_level_has_a_type_and_nothing_refers_elsewhere(resource: Resource) -> None:
    for where, schema in below(schema_of(resource)):
        assert ("type" in schema) != (schema.get("x-kubernetes-int-or-string") is True), where
        assert not {"$ref", "$defs", "title", "nullable", "allOf", "oneOf"} & schema.keys(), where
        assert not ("properties" in schema and "additionalProperties" in schema), where
        if "default" in schema and "properties" in schema:
            filled = {name: inner["default"] for name, inner in schema["properties"].items() if "default" in inner}
            assert schema["default"] == filled, where


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_whatever_is_written_by_users_has_a_bound(resource: Resource) -> None:
    """CEL's costs are estimated from bounds, so that a missing one shows in another place than where it is missing."""
    for where, schema in below(schema_of(resource)["properties"]["spec"], "spec"):
        kind = schema.get("type")
        if kind == "string" and "enum" not in schema:
            assert "maxLength" in schema, where
        elif kind == "array":
            assert "maxItems" in schema, where
        elif "additionalProperties" in schema:
            assert "maxProperties" in schema, where
        elif kind == "integer":
            assert {"minimum", "maximum"} <= schema.keys() or where.endswith("tolerationSeconds"), where


def test_every_rule_is_in_a_schema_with_a_message_on_one_line() -> None:
    parts = [schema for resource in RESOURCES for _, schema in below(schema_of(resource))]
    rules = [rule for schema in parts for rule in schema.get("x-kubernetes-validations", [])]
    assert {"\n" in rule["message"] for rule in rules} == {False}
    assert len({rule["rule"] for rule in rules}) == len(rules_in_crds())


def test_a_service_has_the_columns_names_and_subresource_that_users_rely_on() -> None:
    crd: Any = yaml.safe_load((FOLDER / "serving.baton.dev_inferenceservices.yaml").read_text())
    version = crd["spec"]["versions"][0]
    shown = [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")]
    assert shown == ["Ready", "Prefill", "Decode", "Revision", "URL", "Age"]
    assert crd["spec"]["names"]["shortNames"] == ["isvc"]
    assert version["subresources"] == {"status": {}}
    assert (version["name"], version["served"], version["storage"]) == ("v1alpha1", True, True)


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_the_editors_schema_is_strict_and_knows_no_kubernetes_words(resource: Resource) -> None:
    schema: Any = editor_schema(resource)
    assert "x-kubernetes" not in str(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["kind"]["const"] == resource.kind
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values() if "properties" in part)


def test_a_model_that_fits_no_structural_schema_is_refused_by_name() -> None:
    class Either(Strict):
        """Two types in one field."""

        value: dict[str, int] | list[int]

    class Thing(Strict):
        """Holds one."""

        metadata: dict[str, str]
        spec: Either

    broken = Resource(model=Thing, plural="things", short_names=(), namespaced=True, has_status=False, columns=())
    with pytest.raises(NotStructural, match=r"Thing\.spec\.value"):
        custom_resource(broken)
