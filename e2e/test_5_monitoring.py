"""A real Prometheus scrapes the story as docs/monitoring.md says: each query has data, no alert fires for nothing."""

from __future__ import annotations

import pytest
from story.load import Load
from story.prometheus import Prometheus
from story.world import SERVICE, TEAM, World
from support.chart import alert_queries, alert_rules, dashboard_queries, uses

# Counters with labels have no series before their first event, and these events need not happen in a healthy story.
CONDITIONAL = {
    "baton_kvtransfer_failed_total": "no transfer has failed",
    "baton_kvtransfer_aborts_total": "no transfer was given up",
    "baton_router_retries_total": "no attempt had to be repeated",
}


@pytest.fixture(scope="module")
def scraped(world: World, prometheus: Prometheus | None, load: Load) -> Prometheus:
    """Under load for long enough that rates have two points of every pod."""
    if prometheus is None:
        pytest.skip("Prometheus is not installed: apt-get install --no-install-recommends prometheus")

    def points() -> bool:
        found = prometheus.query('min(count_over_time(up{job="baton"}[30s]))')
        return bool(found) and float(found[0]["value"][1]) >= 5

    with load.undisturbed_by("scrapes"):
        world.wait("scrapes", points)
    return prometheus


def test_every_pod_is_scraped(world: World, scraped: Prometheus) -> None:
    wanted = {
        f"{pod['status']['podIP']}:{port}"
        for role, port in (("prefill", 9090), ("decode", 9090), ("router", 8000), ("operator", 9090))
        for pod in world.pods(role)
    }
    world.wait("all pods up", lambda: {at for at, health in scraped.targets().items() if health == "up"} == wanted)


def test_series_of_a_service_carry_its_name_and_role(scraped: Prometheus) -> None:
    roles = scraped.query(f'count by (serving_baton_dev_role) (up{{serving_baton_dev_service="{SERVICE}"}})')
    assert {row["metric"]["serving_baton_dev_role"] for row in roles} == {"prefill", "decode", "router"}
    ready = scraped.query("baton_operator_service_ready == 1")
    assert {(row["metric"]["namespace"], row["metric"]["service"]) for row in ready} == {(TEAM, SERVICE)}


def test_every_panel_shows_data(scraped: Prometheus) -> None:
    empty = {query.place: query.text for query in dashboard_queries() if not scraped.query(query.text)}
    unexplained = {
        place: text for place, text in empty.items() if not {use.metric for use in uses(text)} & CONDITIONAL.keys()
    }
    assert unexplained == {}


def test_every_metric_that_an_alert_looks_at_is_there(scraped: Prometheus) -> None:
    asked = {use.metric for query in alert_queries() for use in uses(query.text)}
    missing = {metric for metric in asked if not scraped.query(f"last_over_time({metric}[10m])")}
    assert missing <= CONDITIONAL.keys()


def test_no_alert_fires_for_a_service_that_is_well(scraped: Prometheus) -> None:
    names = {str(rule["alert"]) for rule in alert_rules()}
    loaded = {rule["name"] for group in scraped.ask("rules")["groups"] for rule in group["rules"]}
    assert loaded == names
    assert [alert for alert in scraped.alerts() if alert["state"] == "firing"] == []
