"""InferenceService: what is accepted, what is refused, and on which line."""

from pathlib import Path

import pytest

from baton_operator.api import Place, Role, ServiceSpec
from baton_operator.document import InvalidDocument, parse_service, read_service

SMALLEST = """\
apiVersion: serving.baton.dev/v1alpha1
kind: InferenceService
metadata:
  name: demo
spec:
  model:
    uri: hf://Qwen/Qwen3-0.6B
"""


def faults(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(InvalidDocument) as caught:
        parse_service(text)
    return [(fault.line, fault.path, fault.message) for fault in caught.value.faults]


def workers(spec: ServiceSpec) -> tuple[int, int, int]:
    return spec.pool(Role.PREFILL).least, spec.pool(Role.DECODE).least, spec.pool(Role.COLOCATED).least


def test_a_model_is_enough_and_gets_one_worker_of_each_role() -> None:
    spec = parse_service(SMALLEST).spec
    assert workers(spec) == (1, 1, 0)
    assert (spec.router.port, spec.transport.wire, spec.model.dtype) == (8000, "auto", "auto")


def test_every_field_is_taken_over() -> None:
    spec = parse_service(
        SMALLEST.replace("metadata:\n  name: demo", "metadata: {name: demo, namespace: a, labels: {x: y}}")
        + "    servedName: qwen\n    dtype: float32\n    kvDtype: bfloat16\n    contextTokens: 4096\n"
        + "  prefill: {replicas: 2}\n  decode: {replicas: 3}\n  transport: {wire: tcp}\n  router: {port: 9000}\n"
    ).spec
    assert (spec.model.served_name, spec.model.dtype, spec.model.kv_dtype) == ("qwen", "float32", "bfloat16")
    assert (spec.model.context_tokens, workers(spec)) == (4096, (2, 3, 0))
    assert (spec.transport.wire, spec.router.port) == ("tcp", 9000)


def test_an_unknown_field_is_a_fault_with_its_path_and_line() -> None:
    assert faults(SMALLEST + "    servedname: qwen\n") == [
        (8, "spec.model.servedname", "unknown field; remove it or check its spelling")
    ]


def test_all_faults_are_reported_in_the_order_of_their_lines() -> None:
    text = SMALLEST.replace("hf://", "https://") + '  decode:\n    replicas: "2"\n  router: {port: 70000}\n'
    assert [(line, path) for line, path, _ in faults(text)] == [
        (7, "spec.model.uri"),
        (9, "spec.decode.replicas"),
        (10, "spec.router.port"),
    ]


def test_a_missing_field_is_placed_at_what_should_hold_it() -> None:
    assert faults(SMALLEST.replace("    uri: hf://Qwen/Qwen3-0.6B\n", "    dtype: float32\n")) == [
        (6, "spec.model.uri", "required, but missing")
    ]


@pytest.mark.parametrize("uri", ["hf://Qwen", "hf://a/b/c", "/models/x", "https://a/b", "file://", "hf://a/b@"])
def test_a_uri_of_no_known_form_is_refused(uri: str) -> None:
    [(line, path, message)] = faults(SMALLEST.replace("hf://Qwen/Qwen3-0.6B", f'"{uri}"'))
    assert (line, path) == (7, "spec.model.uri")
    assert "hf://owner/name" in message


@pytest.mark.parametrize("pools", ["prefill: {replicas: 0}", "decode: {replicas: 0}"])
def test_one_role_without_the_other_cannot_serve(pools: str) -> None:
    [(_, path, message)] = faults(SMALLEST + f"  {pools}\n")
    assert path == "spec"
    assert "replicas" in message


def test_colocated_workers_serve_alone_once_they_are_mentioned() -> None:
    assert workers(parse_service(SMALLEST + "  colocated: {replicas: 2}\n").spec) == (0, 0, 2)
    none = "  prefill: {replicas: 0}\n  decode: {replicas: 0}\n"
    assert workers(parse_service(SMALLEST + none + "  colocated: {}\n").spec) == (0, 0, 1)


def test_null_is_absent() -> None:
    spec = parse_service(SMALLEST + "  prefill:\n  decode: {replicas: null}\n  router: {port: }\n").spec
    assert (workers(spec), spec.router.port) == ((1, 1, 0), 8000)


def test_broken_rules_are_reported_beside_broken_fields() -> None:
    text = SMALLEST + "    kvDtype: float32\n    dtype: bfloat16\n  prefill: {minReplicas: '1', maxReplicas: 0}\n"
    assert [(line, path) for line, path, _ in faults(text)] == [
        (8, "spec.model.kvDtype"),
        (10, "spec.prefill.maxReplicas"),
        (10, "spec.prefill.minReplicas"),
    ]


@pytest.mark.parametrize(("place", "uri"), [(Place.MACHINE, "pvc://models/a"), (Place.CLUSTER, "file:///models/a")])
def test_a_place_refuses_what_only_the_other_can_read(place: Place, uri: str) -> None:
    text = SMALLEST.replace("hf://Qwen/Qwen3-0.6B", uri)
    for each in Place:
        if each is not place:
            assert parse_service(text, place=each).spec.model.uri == uri
    with pytest.raises(InvalidDocument, match=r"7: spec\.model\.uri: .*use "):
        parse_service(text, place=place)


def test_an_amount_of_no_known_form_is_one_fault() -> None:
    [(line, path, message)] = faults(SMALLEST + "  decode:\n    resources: {limits: {memory: 16 GB}}\n")
    assert (line, path) == (9, "spec.decode.resources.limits.memory")
    assert "16Gi" in message


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 1, "0 documents"),
        ("a: 1\n---\nb: 2\n", 3, "2 documents"),
        ("- 1\n", 1, "not a mapping"),
        ("a: [\n", 2, "not YAML"),
        ("a:\n  b: 1\n  b: 2\n", 3, "written twice, first on line 2"),
        ("a: &x\n  b: *x\n", 1, "contains itself"),
        ("a: !!python/object:os.system {}\n", 1, "tag"),
        ("{[1]: 2}\n", 1, "unhashable"),
        ("a: \x00\n", 1, "not YAML"),
    ],
)
def test_what_yaml_would_swallow_or_choke_on_is_a_fault_with_a_line(text: str, line: int, part: str) -> None:
    [(found, _, message)] = faults(text)
    assert found == line
    assert part in message


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match=r"absent.yaml:1: cannot be read: No such file"):
        read_service(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidDocument, match="not UTF-8"):
        read_service(tmp_path / "binary.yaml")
