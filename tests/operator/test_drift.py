"""What counts as a change of an object, what does not, and how a user's patch is merged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_operator.drift import drifted
from baton_operator.plan.patch import merged
from baton_operator.quantity import amount


def deployment(**container: Any) -> dict[str, Any]:
    base = {"name": "main", "image": "a:1", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
    return {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [{**base, **container}]}}}}


ROLE = {"kind": "Role", "rules": [{"verbs": ["get"]}]}
DEFAULTED = deployment(terminationMessagePath="/dev/x", ports=[])


@pytest.mark.parametrize(
    ("desired", "live", "paths"),
    [
        (deployment(), DEFAULTED, []),
        (deployment(image="b:1"), DEFAULTED, ["spec.template.spec.containers.main.image"]),
        (deployment(resources={"limits": {"cpu": "1000m"}}), DEFAULTED, []),
        (deployment(resources={"limits": {"cpu": "2"}}), DEFAULTED,
         ["spec.template.spec.containers.main.resources.limits.cpu"]),
        (deployment(args=["a", "b"]), deployment(args=["b", "a"]),
         ["spec.template.spec.containers.main.args.0", "spec.template.spec.containers.main.args.1"]),
        (deployment(env=[{"name": "A", "value": "1"}]),
         deployment(env=[{"name": "INJECTED", "value": "x"}, {"name": "A", "value": "1"}]), []),
        (deployment(env=[{"name": "A", "value": "1"}]), deployment(env=[{"name": "A", "value": "2"}]),
         ["spec.template.spec.containers.main.env.A.value"]),
        (ROLE, {"kind": "Role", "rules": [{"verbs": ["get"]}, {}]}, ["rules"]),
        (ROLE, {"kind": "Role", "rules": [{"verbs": ["get", "*"]}]}, ["rules.0.verbs"]),
        ({"kind": "ConfigMap", "data": {"a": "1"}}, {"kind": "ConfigMap", "data": {"a": "1", "b": "2"}}, []),
        ({"kind": "ConfigMap", "data": {"a": "1"}}, {"kind": "ConfigMap"}, ["data"]),
        ({"kind": "Pod", "emptyDir": {}}, {"kind": "Pod"}, []),
        ({"kind": "X", "flag": True}, {"kind": "X", "flag": 1}, ["flag"]),
        ({"kind": "X", "flag": False}, {"kind": "X"}, ["flag"]),
    ],
)  # fmt: skip
def test_a_table_of_drift(desired: dict[str, Any], live: dict[str, Any], paths: list[str]) -> None:
    assert drifted(desired, live) == paths


NAMES = st.sampled_from(["a", "b", "env", "ports"])
JSON = st.recursive(
    st.booleans() | st.integers(0, 3) | st.sampled_from(["", "x", "1Gi"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=3)


@given(OBJECTS)
def test_an_object_does_not_drift_from_itself(item: dict[str, Any]) -> None:
    assert drifted(item, item) == []


@given(OBJECTS, OBJECTS)
def test_fields_of_others_are_no_drift(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert drifted(ours, {**theirs, **ours}) == []


@given(OBJECTS, OBJECTS)
def test_applying_a_patch_twice_is_applying_it_once(base: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merged(base, patch)
    assert merged(once, patch) == once


def test_a_patch_merges_keyed_lists_by_their_key_and_removes_with_null() -> None:
    base = {
        "containers": [{"name": "main", "image": "a", "env": [{"name": "A", "value": "1"}]}, {"name": "other"}],
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "x"}],
    }
    patch = {
        "containers": [{"name": "main", "env": [{"name": "B", "value": "2"}]}, {"name": "new"}],
        "nodeSelector": None,
        "tolerations": [{"key": "y"}],
    }
    assert merged(base, patch) == {
        "containers": [
            {"name": "main", "image": "a", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"name": "other"},
            {"name": "new"},
        ],
        "tolerations": [{"key": "y"}],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("500m", 0.5), ("1Ki", 1024), ("2k", 2000), ("0.5Gi", 2**29), (".5", 0.5), ("x", None), ("1i", None)],
)
def test_quantities(text: str, value: float | None) -> None:
    assert amount(text) == value
