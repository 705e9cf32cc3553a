"""`baton render`: what the operator would make, and what it had to assume. And the samples, which must all be good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.render import Extra, Rendered, extras, render
from baton.request import UpOptions, deployment
from baton_common.errors import ConfigError
from baton_operator.api import InferenceService, Place
from baton_operator.config import OperatorConfig
from baton_operator.document import read_service
from baton_operator.plan.children import desired
from baton_operator.plan.intake import Platform, blueprint
from baton_operator.shipped import shipped_profiles

SAMPLES = Path(__file__).resolve().parents[2] / "docs" / "samples"
BESIDE = {"autoscaled-hpa.yaml": "HorizontalPodAutoscaler", "s3-cached-claim.yaml": "PersistentVolumeClaim"}
SERVICES = sorted(file for file in SAMPLES.glob("*.yaml") if file.name not in BESIDE)
DEMO = SAMPLES / "cpu-demo.yaml"


def rendered(file: Path, *, namespace: str | None = None, profile: Path | None = None, also: str = "") -> Rendered:
    return render(file, namespace=namespace, profile_file=profile, config=OperatorConfig(), extra=extras(also))


def names(found: Rendered) -> set[tuple[Any, Any]]:
    return {(item["kind"], item["metadata"]["name"]) for item in found.objects}  # type: ignore[index,call-overload]


def written(folder: Path, **changes: Any) -> Path:
    document = {**yaml.safe_load(DEMO.read_text()), **changes}
    file = folder / "s.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.parametrize("file", SERVICES, ids=lambda file: file.stem)
def test_every_sample_is_valid_and_renders_a_deployment_for_each_role(file: Path) -> None:
    service = read_service(file, place=Place.CLUSTER)
    found = rendered(file)
    for role in ("prefill", "decode", "router"):
        assert ("Deployment", f"{service.metadata.name}-{role}") in names(found)
    assert [item["kind"] for item in yaml.safe_load_all(found.as_yaml())] == [item["kind"] for item in found.objects]


def test_the_first_sample_has_at_most_fifteen_lines_and_runs_on_one_machine_too() -> None:
    assert len(DEMO.read_text().splitlines()) <= 15
    here = deployment(UpOptions(target=str(DEMO)))
    assert (here.served_name, here.prefill, here.decode, here.colocated) == ("baton-demo", 1, 1, 0)


def test_what_lies_beside_the_samples_belongs_to_one_of_them() -> None:
    files = {file.stem: read_service(file, place=Place.CLUSTER) for file in SERVICES}
    for name, kind in BESIDE.items():
        items = list(yaml.safe_load_all((SAMPLES / name).read_text()))
        assert {item["kind"] for item in items} == {kind}
        service = files[name.removesuffix(".yaml").rpartition("-")[0]]
        if kind == "PersistentVolumeClaim":
            assert items[0]["metadata"]["name"] == service.spec.model.cache_claim
        else:
            pools = {"prefill": service.spec.prefill, "decode": service.spec.decode}
            for item in items:
                pool = pools[item["metadata"]["name"].rpartition("-")[2]]
                assert item["spec"]["scaleTargetRef"]["name"] == item["metadata"]["name"]
                assert pool is not None
                assert (item["spec"]["minReplicas"], item["spec"]["maxReplicas"]) == (pool.least, pool.most)


def test_the_objects_are_those_of_the_operators_planner(tmp_path: Path) -> None:
    file = written(tmp_path, metadata={"name": "demo", "namespace": "team", "uid": "u-1"})
    service = InferenceService.parse(yaml.safe_load(file.read_text()))
    config = OperatorConfig()
    platform = Platform(router_image=config.router_image, worker_image=config.worker_image)
    plan = desired(blueprint(service, shipped_profiles()["cpu"], platform), served=[])
    assert rendered(file).objects == tuple(child.manifest for child in plan.children)


def test_a_service_that_does_not_exist_yet_owns_nothing_and_that_is_said() -> None:
    found = rendered(DEMO, namespace="team")
    for item in found.objects:
        metadata: Any = item["metadata"]
        assert metadata["namespace"] == "team"
        assert "ownerReferences" not in metadata
        assert "serving.baton.dev/applied-hash" not in metadata["annotations"]
    assert any("no owner" in line for line in found.assumed)


def test_kinds_that_not_every_cluster_has_are_left_out_and_named() -> None:
    file = SAMPLES / "gateway.yaml"
    kinds = {kind for kind, _ in names(rendered(file))}
    assert not kinds & {"HTTPRoute", "ServiceMonitor", "PodMonitor"}
    assert {"no HTTPRoute", "no ServiceMonitor", "no PodMonitor"} <= {
        line.partition(":")[0] for line in rendered(file).assumed
    }
    more = rendered(file, also="monitors, http-routes")
    assert {"HTTPRoute", "ServiceMonitor", "PodMonitor"} <= {kind for kind, _ in names(more)}
    assert not any(line.startswith("no H") for line in more.assumed)


def test_a_profile_of_ones_own_comes_from_its_file(tmp_path: Path) -> None:
    profile = shipped_profiles()["cpu"].model_dump(by_alias=True, exclude_none=True, mode="json")
    profile["metadata"] = {"name": "big"}
    profile["spec"]["nodeSelector"] = {"size": "big"}
    own = tmp_path / "big.yaml"
    own.write_text(yaml.safe_dump(profile))
    file = written(tmp_path, spec={"model": {"uri": "baton://demo"}, "profile": "big"})
    with pytest.raises(ConfigError, match=r"profile big does not come with Baton .*--profile-file"):
        rendered(file)
    found: Any = next(item for item in rendered(file, profile=own).objects if item["kind"] == "Deployment")
    assert found["spec"]["template"]["spec"]["nodeSelector"] == {"size": "big"}
    with pytest.raises(ConfigError, match=r"spec.profile is cpu, but .* has big"):
        rendered(DEMO, profile=own)


def test_what_the_operator_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    spec = {"model": {"uri": "baton://demo"}, "profile": "h200", "parallelism": {"tensor": 2}}
    with pytest.raises(ConfigError, match=r"the operator makes nothing of this: .*tensor 2"):
        rendered(written(tmp_path, spec=spec))


@pytest.mark.parametrize("text", ["", "kind: AcceleratorProfile\nspec: {devise: cpu}\n", "a: [", "- 1\n"])
def test_a_broken_profile_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"p\.yaml"):
        rendered(DEMO, profile=file)


def test_two_namespaces_or_an_unknown_extra_are_mistakes(tmp_path: Path) -> None:
    file = written(tmp_path, metadata={"name": "demo", "namespace": "a"})
    with pytest.raises(ConfigError, match=r"-n b, but metadata\.namespace is a"):
        rendered(file, namespace="b")
    with pytest.raises(ConfigError, match=r"monitor.*use monitors, http-routes"):
        extras("monitor")
    assert extras("") == frozenset()
    assert extras("monitors") == {Extra.MONITORS}


def test_objects_go_to_standard_output_and_assumptions_to_standard_error() -> None:
    baton = Path(sys.executable).with_name("baton")
    flags = ("--router-image", "r:1", "--worker-image", "w:1-{flavour}", "--pull-secrets", "a,b")
    run = subprocess.run(
        [str(baton), "render", str(DEMO), *flags], capture_output=True, text=True, check=True, timeout=60
    )
    pods = [
        item["spec"]["template"]["spec"] for item in yaml.safe_load_all(run.stdout) if item["kind"] == "Deployment"
    ]
    assert {pod["containers"][0]["image"] for pod in pods} == {"r:1", "w:1-cpu"}
    assert pods[0]["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert all(line.startswith("baton: assumed: ") for line in run.stderr.splitlines())
    assert "w:1-cpu" in run.stderr
