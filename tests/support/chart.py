"""The chart as tests see it: rendered by real Helm, its objects, and the queries of its dashboards and alerts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser as promql
import yaml
from support import cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/baton"
RELEASE, NAMESPACE = "baton", "baton-system"

# Every switch of the chart is on in one of these and off in another.
COMBINATIONS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "namespaced": {"watch": {"namespaces": ["team-a", "team-b"]}},
    "monitored": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "rules": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True},
        }
    },
    "bare": {
        "crds": {"install": False}, "profiles": {"install": False}, "networkPolicy": {"enabled": False},
        "webhook": {"enabled": False},
        "rbac": {"create": False}, "serviceAccount": {"create": False, "name": "given"},
    },
    "one replica": {"operator": {"replicas": 1, "podDisruptionBudget": {"enabled": False}}},
    "own registry": {
        "image": {"registry": "registry.example.com/team", "tag": "9.9"}, "imagePullSecrets": [{"name": "pull"}],
        "operator": {"image": {"digest": "sha256:" + "a" * 64}},
        "serving": {"imagePullSecrets": ["pull"], "routerImage": {"tag": "8.8"}},
    },
    "scheduled": {
        "operator": {
            "nodeSelector": {"kubernetes.io/os": "linux"}, "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}
            ]}},
            "podAnnotations": {"team": "a"}, "podLabels": {"team": "a"}, "priorityClassName": "system-cluster-critical",
            "settings": {"resync_s": 600},
        },
        "serviceAccount": {"annotations": {"team": "a"}},
    },
    "narrow network": {
        "networkPolicy": {
            "apiServerCIDRs": ["10.96.0.1/32"], "apiServerPorts": [443],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        },
        "crds": {"keep": False}, "profiles": {"keep": False, "hook": False},
    },
    "long names": {"fullnameOverride": "a" * 45, "profiles": {"hook": True}},
}  # fmt: skip


def helm() -> str | None:
    """Path of Helm: the kit's, else that of the machine."""
    return str(cluster.programs() / "helm") if cluster.kit() else shutil.which("helm")


def render(values: Mapping[str, Any], *flags: str, release: str = RELEASE) -> list[dict[str, Any]]:
    """All objects, hooks included. Raises AssertionError with Helm's words."""
    text = template(values, *flags, release=release)
    return [document for document in yaml.safe_load_all(text) if document]


def template(values: Mapping[str, Any], *flags: str, release: str = RELEASE) -> str:
    command = [str(helm()), "template", release, str(CHART), "--namespace", NAMESPACE, "--values", "-", *flags]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False, env=_clean())
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = of_kind(objects, kind)
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def tool(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _clean() -> dict[str, str]:
    """No cluster is asked: nothing of the machine's kubeconfig gets into a rendering."""
    return {**{key: value for key, value in os.environ.items() if key != "KUBECONFIG"}, "KUBECONFIG": os.devnull}


# ---- queries ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """PromQL and where it stands."""

    place: str
    text: str


def dashboard_queries() -> list[Query]:
    """With Grafana's variables replaced as Grafana would."""
    found = []
    for file in sorted((CHART / "dashboards").glob("*.json")):
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                text = target["expr"].replace("$__rate_interval", "1m")
                text = text.replace("$namespace", ".*").replace("$service", ".*")
                found.append(Query(place=f"{file.name}: {panel['title']}", text=text))
    return found


def alert_rules() -> list[dict[str, Any]]:
    return [
        rule
        for file in sorted((CHART / "alerts").glob("*.yaml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def alert_queries() -> list[Query]:
    return [Query(place=f"alert {rule['alert']}", text=rule["expr"]) for rule in alert_rules()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One selection of a metric in a query, with the labels it names."""

    metric: str
    labels: frozenset[str]


def uses(text: str) -> list[Use]:
    """Every metric that a query selects, with the labels it matches or groups by. Raises ValueError: no PromQL."""
    return list(_uses(promql.parse(text), frozenset()))


def _uses(node: Any, grouped: frozenset[str]) -> Iterator[Use]:
    if isinstance(node, promql.VectorSelector):
        yield Use(metric=node.name, labels=grouped | {matcher.name for matcher in node.matchers.matchers})
    elif isinstance(node, promql.MatrixSelector):
        yield from _uses(node.vector_selector, grouped)
    elif isinstance(node, promql.AggregateExpr):
        by = frozenset(node.modifier.labels) if node.modifier else frozenset()
        yield from _uses(node.expr, grouped | by)
    elif isinstance(node, promql.Call):
        for part in node.args:
            yield from _uses(part, grouped)
    elif isinstance(node, promql.BinaryExpr):
        yield from _uses(node.lhs, grouped)
        matched = frozenset(node.modifier.matching.labels) if node.modifier and node.modifier.matching else frozenset()
        # the right side of `and` and `unless` only filters: its labels never reach the result
        filters = str(node.op) in ("and", "unless")
        yield from _uses(node.rhs, matched if filters else grouped | matched)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        yield from _uses(node.expr, grouped)
    elif not isinstance(node, promql.NumberLiteral | promql.StringLiteral):
        raise AssertionError(f"a part of PromQL this test does not know: {type(node).__name__}")
