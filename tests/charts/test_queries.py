"""Dashboards and alerts against the code: no query asks for what is never emitted, and each alert fires and clears."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics import MetricWrapperBase
from support.chart import CHART, ROOT, Query, alert_queries, alert_rules, dashboard_queries, tool, uses

from baton_engine.engine import EngineStats
from baton_kvtransfer.metrics import TransferMetrics
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_operator.metrics import OperatorMetrics
from baton_router.metrics import RouterMetrics
from baton_worker.state import EngineMetrics

QUERIES = [*dashboard_queries(), *alert_queries()]
SCRAPED = frozenset({"namespace", "pod", "job", "instance"})  # what a scrape adds to every series
OF_A_SERVICE = frozenset({"serving_baton_dev_service", "serving_baton_dev_role"})  # from the pod's labels
SUFFIXES = {
    "counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"),
}  # fmt: skip


def emitted() -> dict[str, frozenset[str]]:
    """Every series name that the programs can expose, with its labels, read from their own registries."""
    found: dict[str, frozenset[str]] = {}
    router, transfer, engine, operator = RouterMetrics(), CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    router.watch_workers(lambda: [("10.0.0.1:9000", "prefill", True)])
    TransferMetrics(transfer)
    TierMetrics(transfer)
    stats = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    engine.register(EngineMetrics(lambda: SimpleNamespace(**stats), lambda: 0, lambda: {("op", "torch"): 1}))  # type: ignore[arg-type,return-value]
    OperatorMetrics(operator)
    for registry in (router.registry, transfer, engine):
        found |= {name: labels | SCRAPED | OF_A_SERVICE for name, labels in series(registry)}
    return found | {name: labels | SCRAPED for name, labels in series(operator)}


def series(registry: CollectorRegistry) -> Iterable[tuple[str, frozenset[str]]]:
    """(name, own labels). A labelled metric has no samples before its first use, so its definition is asked."""
    for collector in list(registry._collector_to_names):
        plain = isinstance(collector, MetricWrapperBase)
        declared = frozenset(collector._labelnames) if plain else frozenset[str]()
        families: Iterable[Metric] = collector.describe() if plain else collector.collect()
        for family in families:
            seen = frozenset(label for sample in family.samples for label in sample.labels)
            for suffix in SUFFIXES[family.type]:
                yield family.name + suffix, declared | seen | ({"le"} if suffix == "_bucket" else frozenset())


EMITTED = emitted()


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_every_query_asks_for_what_the_code_emits(query: Query) -> None:
    selected = uses(query.text)
    assert selected
    for use in selected:
        assert use.metric in EMITTED, f"{use.metric} is emitted nowhere"
        unknown = use.labels - EMITTED[use.metric]
        assert not unknown, f"{use.metric} never has {sorted(unknown)}"


def test_the_check_finds_a_metric_and_a_label_that_are_not_there() -> None:
    """The check above can fail."""
    (use,) = uses('sum by (colour) (rate(baton_router_requests_total{code="200"}[1m]))')
    assert use.labels == {"code", "colour"}
    assert use.labels - EMITTED[use.metric] == {"colour"}
    assert "baton_router_requests" not in EMITTED  # a counter's series ends in _total


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.place)
def test_every_panel_is_narrowed_to_the_chosen_services(query: Query) -> None:
    for use in uses(query.text):
        if use.metric != "baton_operator_leader":
            assert {"namespace"} < use.labels
            assert use.labels & {"serving_baton_dev_service", "service"}


def test_dashboards_are_as_generated_and_importable() -> None:
    dashboards = tool("dashboards")
    for path, text in dashboards.files().items():
        assert path.read_text() == text, "run python tools/dashboards.py"
    for board in map(dashboards.document, dashboards.DASHBOARDS.values()):
        panels = board["panels"]
        assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
        assert not overlaps([panel["gridPos"] for panel in panels])
        assert board["uid"]
        assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "namespace", "service"}
        assert all(target["datasource"]["uid"] == "${datasource}" for p in panels for target in p.get("targets", ()))


def overlaps(places: list[dict[str, int]]) -> bool:
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    return len(cells) != len(set(cells)) or max(x for x, _ in cells) > 23


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert {"summary", "description", "runbook_url"} <= rule["annotations"].keys()
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    # a label in the text that the expression drops would print as nothing
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    kept = set().union(*(use.labels for use in uses(str(rule["expr"]))))
    assert named <= kept | SCRAPED | OF_A_SERVICE


def test_every_alert_fires_and_clears() -> None:
    """promtool runs the rules on made-up series: tests/charts/alerts.yaml."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install --no-install-recommends prometheus")
    file = ROOT / "tests/charts/alerts.yaml"
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)", file.read_text()))
    assert tested == {str(rule["alert"]) for rule in alert_rules()}
    assert (CHART / "alerts").is_dir()
