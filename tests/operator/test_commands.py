"""Planner and programs speak one language: every command and every settings file that a service can bring about is
read by the option parser of the very program that it starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.operator_world import PLATFORM, Tree, service_object

from baton_common.settings import parse_command_line
from baton_decode.main import PROGRAM as DECODE
from baton_engine.config import EngineConfig
from baton_fetch.main import _request
from baton_kvtransfer import TransferConfig
from baton_operator.api import InferenceService
from baton_operator.plan.children import Desired, desired
from baton_operator.plan.intake import blueprint
from baton_operator.plan.limits import unsupported
from baton_operator.shipped import shipped_profiles
from baton_prefill.main import PROGRAM as PREFILL
from baton_router.config import RouterConfig
from baton_worker.config import WorkerConfig
from baton_worker.process import FLAG_NAMES, SECTIONS

PROGRAMS = {program.name: program for program in (PREFILL, DECODE)}
MODELS = st.one_of(
    st.builds(
        lambda **more: {"uri": "hf://Qwen/Qwen3-0.6B", **more},
        revision=st.sampled_from([None, "main", "refs/pr/1", "-x"]), endpoint=st.sampled_from([None, "http://hub:8080"]),
        contextTokens=st.sampled_from([None, 16, 16777216]), dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
        servedName=st.sampled_from([None, "a model", "-x", "a=b", "$(HOME)"]),
    ),
    st.sampled_from([
        {"uri": "baton://demo"}, {"uri": "pvc://weights/llama/8b"}, {"uri": "pvc://weights"},
        {"uri": "s3://bucket/folder", "endpoint": "http://minio:9000", "credentialsSecret": "keys"},
        {"uri": "hf://a/b@v1", "kvDtype": "bfloat16", "dtype": "float32"},
    ]),
)  # fmt: skip
SPECS = st.fixed_dictionaries(
    {"model": MODELS, "profile": st.sampled_from(sorted(shipped_profiles()))},
    optional={
        "colocated": st.just({"replicas": 1}),
        "transport": st.fixed_dictionaries({"wire": st.sampled_from(["auto", "tcp", "nixl", "mooncake"])}),
        "cache": st.sampled_from([
            {"hostMemory": "8Gi"}, {"hostMemory": "64Mi", "disk": {"size": "1Gi"}},
            {"hostMemory": "1.5Gi", "mooncake": {"master": "m.ns.svc:50051"}, "sessions": {"quota": "100M"}},
        ]),
        "tracing": st.just({"endpoint": "http://collector.monitoring:4318"}),
        "slo": st.sampled_from([{"itlMs": 20}, {"ttftMs": 500}]),
        "router": st.just({"apiKeysSecret": "keys"}),
    },
)


def described(spec: Tree) -> Tree:
    return {**spec, "model": {key: value for key, value in spec["model"].items() if value is not None}}


def planned(spec: Tree) -> Desired:
    service = InferenceService.parse(service_object(**described(spec)))
    assert unsupported(service.spec) == ""
    return desired(blueprint(service, shipped_profiles()[spec["profile"]], PLATFORM), served=[])


def containers(wanted: Desired) -> list[Any]:
    found: list[Any] = []
    for item in wanted.children:
        if item.kind.kind == "Deployment":
            pod: Any = item.manifest["spec"]
            found += [*pod["template"]["spec"].get("initContainers", []), *pod["template"]["spec"]["containers"]]
    return found


def run_parser(command: Sequence[str], file: Path) -> str:
    """The model's name, where the program is told one. Raises ConfigError or SystemExit when it would refuse."""
    told = [word.replace("$$", "$") for word in command]  # as the kubelet does
    program, *words = [str(file) if word == "/etc/baton/settings.yaml" else word for word in told]
    if program == "baton-fetch":
        _request(words).place()
        return ""
    environment = {}
    if program == "baton-router":
        line = parse_command_line({"router": RouterConfig}, program=program, argv=words, environment=environment)
        router = line.resolve(RouterConfig, section="router").value
        assert router.worker_services
        return router.served_name
    line = parse_command_line(
        SECTIONS, program=program, argv=words, environment=environment, flag_names=FLAG_NAMES
    )
    worker = line.resolve(WorkerConfig, section="worker").value
    line.resolve(EngineConfig, section="engine")
    line.resolve(TransferConfig, section="transfer")
    assert worker.role in PROGRAMS[program].roles
    assert worker.model
    return worker.model_name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=SPECS)
def test_every_program_understands_what_it_is_told(tmp_path: Path, spec: Tree) -> None:
    wanted = planned(spec)
    file = tmp_path / "settings.yaml"
    [made] = [item.manifest for item in wanted.children if item.kind.kind == "ConfigMap"]
    data: Any = made["data"]
    file.write_text(data["settings.yaml"])
    name = InferenceService.parse(service_object(**described(spec))).spec.model.name
    for container in containers(wanted):
        assert run_parser(container["command"], file) in ("", name)


@pytest.mark.parametrize("name", ["baton_prefill.main", "baton_decode.main", "baton_router.main", "baton_fetch.main"])
def test_the_programs_exist_under_the_names_that_the_pods_start(name: str) -> None:
    assert callable(importlib.import_module(name).main)


def test_a_flag_that_a_program_does_not_have_is_noticed(tmp_path: Path) -> None:
    """This test can fail."""
    file = tmp_path / "settings.yaml"
    file.write_text("{}")
    with pytest.raises(SystemExit):
        run_parser(["baton-decode", "--model", "x", "--tensor-parallel", "2"], file)
