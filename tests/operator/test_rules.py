"""Every cross-field rule, offline: what is taken, what is refused, where, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from support.api_objects import MISFITS, PROFILES, SERVICES, Case, profile, rules_in_crds, service

from baton_operator.api import AcceleratorProfile, InferenceService, Place, violations


def faults(case: Case, kind: str) -> dict[str, tuple[str, str]]:
    """{path: (rule, message)}"""
    if kind == "InferenceService":
        found = violations(InferenceService.model_validate(service(case.spec, name=case.called)), Place.CLUSTER)
    else:
        old = None if case.was is None else AcceleratorProfile.model_validate(profile(case.was))
        found = violations(AcceleratorProfile.model_validate(profile(case.spec)), Place.CLUSTER, old=old)
    assert len({item.path for item in found}) == len(found)
    return {dotted(item.path): (item.rule, item.message) for item in found}


def dotted(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def check(case: Case, found: dict[str, tuple[str, str]]) -> None:
    assert found.keys() == case.faults.keys()
    for path, ending in case.faults.items():
        assert found[path][1].endswith(ending)


@pytest.mark.parametrize("case", SERVICES, ids=lambda case: case.name)
def test_a_service_is_taken_or_refused_for_exactly_these_faults(case: Case) -> None:
    check(case, faults(case, "InferenceService"))


@pytest.mark.parametrize("case", PROFILES, ids=lambda case: case.name)
def test_a_profile_is_taken_or_refused_for_exactly_these_faults(case: Case) -> None:
    check(case, faults(case, "AcceleratorProfile"))


def test_every_rule_has_an_object_that_breaks_it() -> None:
    tables = (("InferenceService", SERVICES), ("AcceleratorProfile", PROFILES))
    broken = {rule for kind, cases in tables for case in cases for rule, _ in faults(case, kind).values()}
    assert broken == rules_in_crds()


def test_every_message_says_what_to_do() -> None:
    verbs = ("use ", "set ", "remove ", "keep ", "raise ", "lower ", "choose ", "give ", "make ", "change ", "add ")
    for kind, cases in (("InferenceService", SERVICES), ("AcceleratorProfile", PROFILES)):
        for case in cases:
            for _, message in faults(case, kind).values():
                assert any(verb in message for verb in verbs), message


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InferenceService.parse(service(change))


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ({"model": {"uri": "file://./a"}, "transport": {"wire": "shm"}}, None),
        ({"model": {"uri": "s3://abc/d"}}, "use hf://, file:// or baton://demo"),
        ({"model": {"uri": "pvc://a"}}, "use hf://, file:// or baton://demo"),
        ({"transport": {"wire": "nixl"}, "cache": {"hostMemory": "1Gi"}}, None),
        ({"cache": {"sessions": {"quota": "1Gi"}}}, "set cache.hostMemory, or remove cache"),
        ({"decode": {"replicas": 0}}, "or neither and use colocated"),
    ],
)
def test_one_machine_has_rules_of_its_own(spec: dict[str, Any], fault: str | None) -> None:
    found = violations(InferenceService.model_validate(service(spec)), Place.MACHINE)
    assert len(found) == (fault is not None)
    assert all(str(fault) in item.message for item in found)


def test_parse_names_every_broken_rule_with_its_path() -> None:
    with pytest.raises(ValidationError) as caught:
        InferenceService.parse(service({"decode": {"minReplicas": 3}, "transport": {"wire": "shm"}}))
    assert {item["loc"]: item["type"] for item in caught.value.errors()} == {
        ("spec", "decode"): "rule",
        ("spec", "transport", "wire"): "rule",
    }
