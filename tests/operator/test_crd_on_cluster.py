"""The CRDs on a real API server: it refuses and fills in exactly what the models do, in the same words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.api_objects import MISFITS, PROFILES, SERVICES, Case, Tree, profile, service
from support.cluster import Answer, Cluster

from baton_operator.api import AcceleratorProfile, InferenceService, Place, violations
from baton_operator.shipped import FOLDER

pytestmark = pytest.mark.cluster

GROUP = "/apis/serving.baton.dev/v1alpha1"
SERVICE_PATH = f"{GROUP}/namespaces/default/inferenceservices"
PROFILE_PATH = f"{GROUP}/acceleratorprofiles"
STRICT = "fieldValidation=Strict"
USEFUL = """\
apiVersion: serving.baton.dev/v1alpha1
kind: InferenceService
metadata:
  name: chat
spec:
  model:
    uri: hf://Qwen/Qwen3-0.6B
    servedName: qwen
  profile: h200
  prefill:
    replicas: 2
  decode: {minReplicas: 2, maxReplicas: 8}
  router: {replicas: 2, apiKeysSecret: chat-keys}
  slo: {ttftMs: 500, itlMs: 40}
"""


def try_service(api: Cluster, written: Tree) -> Answer:
    return api.request("POST", f"{SERVICE_PATH}?dryRun=All&{STRICT}", written)


def refused_for(answer: Answer) -> set[tuple[str, str]]:
    """(path, message) of every fault that the API server names."""
    causes = answer.body.get("details", {}).get("causes", [])
    return {(cause["field"].replace("<nil>", ""), words(cause["message"])) for cause in causes}


def words(text: str) -> str:
    """Without the value, which stands before them: `Invalid value: "object": use ...`."""
    return re.sub(r'^Invalid value: (?:"(?:[^"\\]|\\.)*"|\{.*?\}|\[.*?\]|[^\s:]+|null): ', "", text, flags=re.S)


def without_empty(value: Any) -> Any:
    """Maps and lists in which there is nothing have no default: they would only be noise in `kubectl get -o yaml`."""
    if isinstance(value, dict):
        return {key: without_empty(item) for key, item in value.items() if item not in ({}, [])}
    return value


def offline(found: list[Any]) -> set[tuple[str, str]]:
    return {
        ("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item.path)[1:], item.message)
        for item in found
    }


@pytest.mark.parametrize("case", SERVICES, ids=lambda case: case.name)
def test_a_service_gets_the_verdict_of_the_models_word_for_word(api: Cluster, case: Case) -> None:
    written = service(case.spec, name=case.called)
    answer = try_service(api, written)
    expected = offline(violations(InferenceService.model_validate(written), Place.CLUSTER))
    assert refused_for(answer) == expected
    assert answer.ok == (not expected), answer.text


@pytest.mark.parametrize("case", PROFILES, ids=lambda case: case.name)
def test_a_profile_gets_the_verdict_of_the_models_word_for_word(api: Cluster, case: Case) -> None:
    written = profile(case.spec, name=case.name)
    old = None
    if case.was is None:
        answer = api.request("POST", f"{PROFILE_PATH}?dryRun=All&{STRICT}", written)
    else:
        before = api.request("POST", f"{PROFILE_PATH}?{STRICT}", profile(case.was, name=case.name))
        assert before.ok, before.text
        old = AcceleratorProfile.parse(before.body)
        written["metadata"]["resourceVersion"] = before.body["metadata"]["resourceVersion"]
        answer = api.request("PUT", f"{PROFILE_PATH}/{case.name}?{STRICT}", written)
        api.request("DELETE", f"{PROFILE_PATH}/{case.name}")
    expected = offline(violations(AcceleratorProfile.model_validate(written), Place.CLUSTER, old=old))
    assert refused_for(answer) == expected
    assert answer.ok == (not expected), answer.text


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_the_schema_refuses_what_the_models_refuse(api: Cluster, change: Mapping[str, Any]) -> None:
    answer = try_service(api, service(change))
    assert answer.status in (400, 422), answer.body


def test_an_unknown_field_is_named_not_dropped(api: Cluster) -> None:
    answer = try_service(api, service({"prefil": {}}))
    assert 'unknown field "spec.prefil"' in answer.text
    text = api.kubectl("apply", "-f", "-", stdin=json.dumps(service({"prefil": {}})), check=False)
    assert 'unknown field "spec.prefil"' in text


def test_fifteen_lines_are_a_service_and_the_server_fills_in_the_models_defaults(api: Cluster) -> None:
    assert len(USEFUL.splitlines()) <= 15
    api.kubectl("apply", "-f", "-", stdin=USEFUL)
    stored = json.loads(api.kubectl("get", "isvc", "chat", "-o", "json"))
    api.kubectl("delete", "isvc", "chat")
    spec = stored["spec"]
    assert spec["rollout"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert (spec["parallelism"], spec["transport"]) == ({"tensor": 1}, {"wire": "auto"})
    assert (spec["router"]["port"], spec["router"]["service"]) == (8000, {"type": "ClusterIP"})
    assert (spec["model"]["dtype"], spec["model"]["kvDtype"], spec["slo"]["percentile"]) == ("auto", "auto", 90)
    ours = InferenceService.parse(yaml.safe_load(USEFUL)).spec
    assert InferenceService.parse(stored).spec == ours
    assert without_empty(ours.model_dump(by_alias=True, exclude_none=True)) == spec


def test_null_is_absent_for_the_server_too(api: Cluster) -> None:
    written = service({"prefill": None, "decode": {"replicas": None}, "router": {"port": None}, "slo": None})
    answer = try_service(api, written)
    assert answer.ok, answer.text
    assert InferenceService.parse(answer.body).spec == InferenceService.parse(written).spec


def test_kubectl_shows_what_the_status_says(api: Cluster) -> None:
    api.kubectl("apply", "-f", "-", stdin=USEFUL)
    role = {"desired": 2, "updated": 2, "ready": 1, "routable": 1, "summary": "1/2"}
    now = "2026-01-01T00:00:00Z"
    ready = {"type": "Ready", "status": "False", "reason": "PodsStarting", "message": "", "lastTransitionTime": now}
    status = {
        "observedGeneration": 1,
        "conditions": [ready],
        "roles": {"prefill": role, "decode": {**role, "summary": "2/2"}},
        "url": "http://chat.default.svc:8000",
        "updatedRevision": "chat-7f",
    }
    path = f"{SERVICE_PATH}/chat/status?{STRICT}"
    answer = api.request("PATCH", path, {"status": status}, content_type="application/merge-patch+json")
    assert answer.ok, answer.text
    assert InferenceService.parse(answer.body).status is not None
    header, row = api.kubectl("get", "isvc", "chat").splitlines()
    assert header.split() == ["NAME", "READY", "PREFILL", "DECODE", "REVISION", "URL", "AGE"]
    assert row.split()[:6] == ["chat", "False", "1/2", "2/2", "chat-7f", "http://chat.default.svc:8000"]
    assert "PodsStarting" in api.kubectl("get", "isvc", "chat", "-o", "wide")
    wrong = {"status": {"conditions": [{**ready, "type": "Redy"}]}}
    assert not api.request("PATCH", path, wrong, content_type="application/merge-patch+json").ok
    api.kubectl("delete", "isvc", "chat")


def test_the_shipped_profiles_are_taken(api: Cluster) -> None:
    for file in sorted(FOLDER.glob("*.yaml")):
        api.kubectl("apply", "-f", str(file))
    rows = api.kubectl("get", "accprof").splitlines()
    assert rows[0].split() == ["NAME", "DEVICE", "GPU", "PER-NODE", "RDMA", "ARCH", "AGE"]
    assert [row.split()[0] for row in rows[1:]] == ["cpu", "gb200", "h200", "mi355x"]
    api.kubectl("delete", "accprof", "--all")


# ---- any mixture of fields -------------------------------------------------------------------------------------------
def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


COUNT = st.sampled_from([0, 1, 2])
BOUND = st.sampled_from([1, 2, 3])
PARALLEL = some(tensor=st.sampled_from([1, 2, 3]))
AMOUNT = st.sampled_from([1, "1", "1000m", "999m", "1Ki", "1k", "0.5", "1.5Gi", "1Pi"])
RESOURCES = some(
    requests=some(cpu=AMOUNT, memory=AMOUNT, **{"nvidia.com/gpu": AMOUNT}), limits=some(cpu=AMOUNT, memory=AMOUNT)
)
POOL = some(replicas=COUNT, minReplicas=BOUND, maxReplicas=BOUND, parallelism=PARALLEL, resources=RESOURCES)
ZERO_OR_NOT = st.sampled_from([0, 1, "0%", "25%"])
URI = st.sampled_from(
    ["hf://a/b", "hf://a/b@c", "hf://é/b", "pvc://a/b", "pvc://a", "s3://abc/d", "s3://abc", "file:///a", "a\n", "baton://demo"]
)
SPEC = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"uri": URI},
            optional={
                "revision": st.just("main"), "endpoint": st.just("http://a:1"), "cacheClaim": st.just("c"),
                "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
                "kvDtype": st.sampled_from(["auto", "float32", "bfloat16"]),
            },
        )
    },
    optional={
        "profile": st.sampled_from(["cpu", "h200"]), "parallelism": PARALLEL, "prefill": POOL, "decode": POOL,
        "colocated": POOL, "rollout": some(maxSurge=ZERO_OR_NOT, maxUnavailable=ZERO_OR_NOT),
        "transport": some(wire=st.sampled_from(["auto", "shm", "tcp", "nixl"])),
        "slo": some(ttftMs=st.just(1), itlMs=st.just(1)),
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=SPEC)
def test_server_and_models_agree_on_any_mixture(api: Cluster, spec: dict[str, Any]) -> None:
    written = service()
    written["spec"] = spec
    answer = try_service(api, written)
    parsed = InferenceService.model_validate(written)
    assert refused_for(answer) == offline(violations(parsed, Place.CLUSTER)), answer.text
    if answer.ok:
        assert InferenceService.parse(answer.body).spec == parsed.spec
