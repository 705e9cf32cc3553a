"""What Helm renders, for every combination of values: valid, least rights, fit for PSS restricted, true to sources."""

from __future__ import annotations

import json
import re
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.chart import CHART, COMBINATIONS, NAMESPACE, helm, of_kind, one, render, template, tool

from baton_common.settings import resolve
from baton_operator import kinds
from baton_operator.api import InferenceService
from baton_operator.config import OperatorConfig
from baton_operator.plan.access import identities
from baton_operator.shipped import shipped_profiles

pytestmark = pytest.mark.skipif(helm() is None, reason="no Helm: neither the test cluster kit nor helm on the PATH")

Objects = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rendered() -> dict[str, Objects]:
    return {name: render(values) for name, values in COMBINATIONS.items()}


# ---- every combination ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMBINATIONS)
def test_names_are_unique_and_short(name: str, rendered: dict[str, Objects]) -> None:
    objects = rendered[name]
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(keys) == len(set(keys))
    for item in objects:
        if item["kind"] != "CustomResourceDefinition":
            assert len(item["metadata"]["name"]) <= (253 if re.search("Role|Webhook", item["kind"]) else 63)
        assert all(len(str(value)) <= 63 for value in item["metadata"].get("labels", {}).values())


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_role_has_a_wildcard_or_can_raise_itself(name: str, rendered: dict[str, Objects]) -> None:
    for role in [*of_kind(rendered[name], "Role"), *of_kind(rendered[name], "ClusterRole")]:
        for rule in role["rules"]:
            words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in "".join(words)
            assert not {"escalate", "bind", "impersonate"} & set(words)
            assert "nonResourceURLs" not in rule
            if "secrets" in rule["resources"]:  # one that is named, never all of them; only its own is written
                assert rule["verbs"] == (["get", "update"] if "resourceNames" in rule else ["get"])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_pods_fit_pss_restricted(name: str, rendered: dict[str, Objects]) -> None:
    pod = one(rendered[name], "Deployment")["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(set(volume) <= {"name", "configMap", "emptyDir"} for volume in pod["volumes"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert container["readinessProbe"]
        assert container["livenessProbe"]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_operator_understands_its_settings(name: str, rendered: dict[str, Objects], tmp_path: Any) -> None:
    """The file is read by the operator's own strict reader: an unknown or mistyped setting fails here."""
    settings = next(o for o in of_kind(rendered[name], "ConfigMap") if "settings.yaml" in o["data"])
    file = tmp_path / "settings.yaml"
    file.write_text(settings["data"]["settings.yaml"])
    found = resolve(OperatorConfig, section="operator", file=file).value
    assert list(found.namespaces) == COMBINATIONS[name].get("watch", {}).get("namespaces", [])
    assert "{flavour}" in found.worker_image
    container = one(rendered[name], "Deployment")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    hook = {"webhook": found.webhook_port} if found.webhook_port else {}
    assert ports == {"metrics": found.metrics_port, "health": found.health_port, **hook}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_selectors_find_the_operator(name: str, rendered: dict[str, Objects]) -> None:
    objects = rendered[name]
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert one(objects, "Deployment")["spec"]["selector"]["matchLabels"].items() <= labels
    for service in of_kind(objects, "Service"):
        assert service["spec"]["selector"].items() <= labels
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for item in of_kind(objects, kind):
            assert item["spec"][path]["matchLabels"].items() <= labels
    for monitor in of_kind(objects, "ServiceMonitor"):
        [service] = [item for item in of_kind(objects, "Service") if item["metadata"]["name"].endswith("-metrics")]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= {
            port["name"] for port in service["spec"]["ports"]
        }


# ---- the webhook -----------------------------------------------------------------------------------------------------
OWN_WEBHOOK = ("validatingwebhookconfigurations",)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_webhook_is_asked_for_changed_services_only_and_never_in_the_way(
    name: str, rendered: dict[str, Objects]
) -> None:
    objects = rendered[name]
    made = of_kind(objects, "ValidatingWebhookConfiguration")
    settings = one([o for o in of_kind(objects, "ConfigMap") if "settings.yaml" in o["data"]], "ConfigMap")
    own = yaml.safe_load(settings["data"]["settings.yaml"])["operator"]
    if not COMBINATIONS[name].get("webhook", {}).get("enabled", True):
        assert made == []
        assert own["webhook_port"] == 0
        return
    [hook] = made[0]["webhooks"]
    assert made[0]["metadata"]["name"] == f"{NAMESPACE}-{own['webhook_name']}"
    assert (hook["failurePolicy"], hook["sideEffects"]) == ("Ignore", "None")
    assert hook["timeoutSeconds"] <= 5
    assert hook["rules"] == [{
        "apiGroups": ["serving.baton.dev"], "apiVersions": ["v1alpha1"], "operations": ["CREATE", "UPDATE"],
        "resources": ["inferenceservices"], "scope": "Namespaced",
    }]  # fmt: skip
    [service] = [o for o in of_kind(objects, "Service") if o["metadata"]["name"] == own["webhook_name"]]
    assert hook["clientConfig"]["service"]["name"] == own["webhook_name"]
    assert service["spec"]["ports"][0]["port"] == hook["clientConfig"]["service"]["port"]
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        let_in = [port for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        assert {"port": "webhook", "protocol": "TCP"} in let_in
    chosen = COMBINATIONS[name].get("watch", {}).get("namespaces")
    if chosen:
        assert hook["namespaceSelector"]["matchExpressions"][0]["values"] == chosen


def test_an_upgrade_empties_neither_the_secret_nor_the_bundle(rendered: dict[str, Objects]) -> None:
    """What the operator fills in is not in the chart, so no way of applying it takes it away."""
    secret = one(rendered["defaults"], "Secret")
    assert set(secret) == {"apiVersion", "kind", "metadata", "type"}
    [hook] = one(rendered["defaults"], "ValidatingWebhookConfiguration")["webhooks"]
    assert set(hook["clientConfig"]) == {"service"}


def test_the_operator_may_write_the_secret_and_the_configuration_of_its_own_webhook_alone(
    rendered: dict[str, Objects]
) -> None:
    objects = rendered["defaults"]
    rules = [rule for kind in ("Role", "ClusterRole") for role in of_kind(objects, kind) for rule in role["rules"]]
    own = {
        resource: (rule["resourceNames"], rule["verbs"])
        for rule in rules if "resourceNames" in rule for resource in rule["resources"]
    }  # fmt: skip
    assert own["secrets"] == (["baton-operator-webhook"], ["get", "update"])
    assert own["validatingwebhookconfigurations"] == ([f"{NAMESPACE}-baton-operator-webhook"], ["get", "patch"])


# ---- rights --------------------------------------------------------------------------------------------------------
def rights(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_operator_may_do_what_it_does_with_its_children(rendered: dict[str, Objects]) -> None:
    held = rights(one(rendered["defaults"], "ClusterRole"))
    for kind in kinds.CHILD_KINDS:
        for verb in ("get", "list", "create", "patch", "delete"):
            assert (kind.group, kind.plural, verb) in held


def test_what_it_grants_to_pods_it_holds_itself(rendered: dict[str, Objects]) -> None:
    """Else the API server refuses the Role: nobody may give what he has not."""
    service = SimpleNamespace(name="s", namespace="n", uid="u")
    granted = [dict(item.manifest) for item in identities(service) if item.kind == kinds.ROLE]  # type: ignore[arg-type]
    assert granted
    for role in granted:
        assert rights(role) <= rights(one(rendered["defaults"], "ClusterRole"))


def test_in_chosen_namespaces_it_has_no_right_elsewhere(rendered: dict[str, Objects]) -> None:
    objects = rendered["namespaced"]
    cluster_wide = rights(one(objects, "ClusterRole"))
    assert {resource for _, resource, _ in cluster_wide} == {"acceleratorprofiles", *OWN_WEBHOOK}
    roles = {role["metadata"]["namespace"]: rights(role) for role in of_kind(objects, "Role")}
    assert set(roles) == {"team-a", "team-b", NAMESPACE}
    assert {resource for _, resource, _ in roles[NAMESPACE]} == {"leases", "secrets"}
    everywhere = rights(one(rendered["defaults"], "ClusterRole"))
    assert everywhere - roles["team-a"] - cluster_wide == {
        ("apiextensions.k8s.io", "customresourcedefinitions", verb) for verb in ("list", "watch")
    }
    assert roles["team-a"] | cluster_wide < everywhere


# ---- sources -------------------------------------------------------------------------------------------------------
def test_copies_in_the_chart_equal_their_sources() -> None:
    chart = tool("chart")
    assert chart.wanted() == chart.present(), "run python tools/chart.py"
    assert {path.parent.name for path in chart.wanted()} == {"crds", "profiles"}


@pytest.mark.parametrize(("kind", "folder"), [("CustomResourceDefinition", "crds"), ("AcceleratorProfile", "profiles")])
def test_crds_and_profiles_are_rendered_unchanged(kind: str, folder: str, rendered: dict[str, Objects]) -> None:
    sources = {}
    for file in (CHART / "files" / folder).glob("*.yaml"):
        document = yaml.safe_load(file.read_text())
        sources[document["metadata"]["name"]] = document["spec"]
    made = {item["metadata"]["name"]: item["spec"] for item in of_kind(rendered["defaults"], kind)}
    assert made == sources
    assert made


def test_removing_the_release_keeps_crds_and_profiles_unless_told_otherwise(rendered: dict[str, Objects]) -> None:
    for kind in ("CustomResourceDefinition", "AcceleratorProfile"):
        for item in of_kind(rendered["defaults"], kind):
            assert item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        free = [i["metadata"].get("annotations") or {} for i in of_kind(rendered["narrow network"], kind)]
        assert all("helm.sh/resource-policy" not in annotations for annotations in free)


def test_profiles_are_a_hook_only_where_their_kind_is_unknown() -> None:
    known = ("--api-versions", "serving.baton.dev/v1alpha1/AcceleratorProfile")
    for values, flags, hook in (
        ({}, (), True), ({}, known, False),
        ({"profiles": {"hook": False}}, (), False), ({"profiles": {"hook": True}}, known, True),
    ):  # fmt: skip
        profiles = of_kind(render(values, *flags), "AcceleratorProfile")
        assert profiles
        for profile in profiles:
            annotations = profile["metadata"]["annotations"]
            assert ("helm.sh/hook" in annotations) is hook
            # what lets the next upgrade take them over
            assert ("meta.helm.sh/release-name" in annotations) is hook


def test_alerts_and_dashboards_are_rendered_unchanged(rendered: dict[str, Objects]) -> None:
    objects = rendered["monitored"]
    rules = {r["metadata"]["name"].removeprefix("baton-"): r["spec"] for r in of_kind(objects, "PrometheusRule")}
    assert rules == {f.stem: yaml.safe_load(f.read_text()) for f in (CHART / "alerts").glob("*.yaml")}
    boards = {
        name: json.loads(text)
        for item in of_kind(objects, "ConfigMap") if item["metadata"]["labels"].get("grafana_dashboard")
        for name, text in item["data"].items()
    }  # fmt: skip
    assert boards == {f.name: json.loads(f.read_text()) for f in (CHART / "dashboards").glob("*.json")}


def test_images_come_from_the_chosen_registry(rendered: dict[str, Objects]) -> None:
    objects = rendered["own registry"]
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/team/baton/operator@sha256:" + "a" * 64
    text = json.dumps([o["data"] for o in of_kind(objects, "ConfigMap")])
    assert "registry.example.com/team/baton/router:8.8" in text
    assert "registry.example.com/team/baton/worker:9.9-{flavour}" in text


# ---- values --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"operater": {}}, "operater"),
        ({"operator": {"replicas": 0}}, "/operator/replicas"),
        ({"operator": {"replica": 2}}, "replica"),
        ({"operator": {"settings": {"lease_name": "x"}}}, "lease_name"),
        ({"operator": {"image": {"digest": "latest"}}}, "/operator/image/digest"),
        ({"watch": {"namespaces": "team-a"}}, "/watch/namespaces"),
        ({"watch": {"namespaces": ["Team_A"]}}, "/watch/namespaces/0"),
        ({"networkPolicy": {"apiServerPorts": []}}, "/networkPolicy/apiServerPorts"),
        ({"monitoring": {"rules": {"enabled": "yes"}}}, "/monitoring/rules/enabled"),
        ({"webhook": {"port": 0}}, "/webhook/port"),
        ({"operator": {"settings": {"webhook_port": 1}}}, "webhook_port"),
        ({"profiles": {"hook": "sometimes"}}, "/profiles/hook"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], part: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(part)):
        template(values)


def test_the_schema_describes_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, part in schema["properties"].items():
        if isinstance(values.get(name), dict):
            assert part["additionalProperties"] is False
            assert set(part["properties"]) == set(values[name]), name


def test_notes_tell_the_next_command() -> None:
    notes = (CHART / "templates/NOTES.txt").read_text()
    assert "kubectl apply" in notes
    assert "kubectl get isvc" in notes
    sample = notes.split("<<YAML\n")[1].split("     YAML\n")[0]
    service = InferenceService.parse(yaml.safe_load(textwrap.dedent(sample)))
    assert len(sample.splitlines()) <= 15
    assert service.spec.profile in shipped_profiles()
