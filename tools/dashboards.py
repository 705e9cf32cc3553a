"""The Grafana dashboards, as tables of panels: `python tools/dashboards.py` writes charts/baton/dashboards/*.json.

Invariants: a panel asks only for metrics that the code emits (tests/charts/test_queries.py); every query is narrowed to
the chosen namespace and service. The data source is a variable, so a file can be imported as it is.
`<S>` in a query stands for that narrowing, `<O>` for the same on the operator's own metrics.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

FOLDER = Path(__file__).resolve().parent.parent / "charts/baton/dashboards"
NARROWED = {
    "<S>": 'namespace=~"$namespace",serving_baton_dev_service=~"$service"',
    "<O>": 'namespace=~"$namespace",service=~"$service"',
}
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `queries` are (legend, PromQL)."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    text: str = ""
    width: int = 8
    most: float | None = None
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    text: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def quantiles(metric: str, matchers: str, *, by: str = "") -> tuple[tuple[str, str], ...]:
    """p50, p90 and p99 of a histogram."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    inner = f"sum by ({labels}) (rate({metric}_bucket{{{matchers}}}[$__rate_interval]))"
    return tuple((f"p{q}{legend}", f"histogram_quantile(0.{q}, {inner})") for q in (50, 90, 99))


def rate(metric: str, matchers: str = "<S>", *, by: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({metric}{{{matchers}}}[$__rate_interval]))"


HANDOFFS = rate("baton_router_placed_total", 'how="handoff",<S>')
# the series of a way that was never gone does not exist: then the ratio is 0, not unknown
HANDOFF_RATIO = f"({HANDOFFS} or vector(0)) / {rate('baton_router_placed_total')}"
HIT_RATIO = f"{rate('baton_router_cached_tokens_total')} / {rate('baton_router_prompt_tokens_total')}"
POSTING = (
    f"{rate('baton_kvtransfer_posting_seconds_sum', by='wire')} / "
    f"{rate('baton_kvtransfer_posting_seconds_count', by='wire')}"
)
WORKERS = "sum by (role) (max by (role, address) (baton_router_worker_up{<S>}))"
# only the leader keeps the conditions up to date
READY = "baton_operator_service_ready{<O>} and on (pod) baton_operator_leader == 1"

OVERVIEW = Dashboard(
    uid="baton-service",
    title="Baton / Service overview",
    text="What clients see of a service, and the pools behind it.",
    rows=(
        ("Now", (
            Panel(title="Ready", kind="stat", width=4, queries=(("{{service}}", READY),),
                  text="1 = the InferenceService is Ready."),
            Panel(title="Requests per second", kind="stat", unit="reqps", width=4,
                  queries=(("", rate("baton_router_requests_total")),)),
            Panel(title="In flight", kind="stat", width=4, queries=(("", "sum(baton_router_inflight{<S>})"),)),
            Panel(title="TTFT p90", kind="stat", unit="s", width=4,
                  queries=(quantiles("baton_router_ttft_seconds", "<S>")[1],)),
            Panel(title="ITL p90", kind="stat", unit="s", width=4,
                  queries=(quantiles("baton_router_itl_seconds", "<S>")[1],)),
            Panel(title="Workers taking requests", kind="stat", width=4, queries=(("{{role}}", WORKERS),)),
        )),
        ("Traffic", (
            Panel(title="Requests by code", unit="reqps", stacked=True,
                  queries=(("{{code}}", rate("baton_router_requests_total", by="code")),)),
            Panel(title="Tokens per second", unit="short", queries=(
                ("prompt", rate("baton_router_prompt_tokens_total")),
                ("output", rate("baton_router_output_tokens_total")))),
            Panel(title="Repeated attempts and departures", unit="ops", queries=(
                ("retry {{reason}}", rate("baton_router_retries_total", by="reason")),
                ("client left", rate("baton_router_client_disconnects_total"))),
                text="An attempt is repeated when a worker refuses or is lost; clients see a pause, not an error."),
        )),
        ("Latency", (
            Panel(title="Time to first token", unit="s", queries=quantiles("baton_router_ttft_seconds", "<S>")),
            Panel(title="Between two tokens", unit="s", queries=quantiles("baton_router_itl_seconds", "<S>")),
            Panel(title="Whole answer", unit="s", queries=quantiles("baton_router_request_seconds", "<S>")),
        )),
        ("Cache", (
            Panel(title="Prompt tokens found in a cache", unit="percentunit", most=1,
                  queries=(("hit ratio", HIT_RATIO),)),
            Panel(title="Where prompts were computed", unit="ops", stacked=True,
                  queries=(("{{how}}", rate("baton_router_placed_total", by="how")),),
                  text="handoff: by a prefill worker; local_short: by decode, for little was left; local: no choice."),
            Panel(title="KV pages by owner", stacked=True,
                  queries=(("{{state}}", "sum by (state) (baton_engine_pages{<S>})"),)),
        )),
        ("Pools", (
            Panel(title="Pool sizes", queries=(
                ("{{role}} known", "count by (role) (max by (role, address) (baton_router_worker_up{<S>}))"),
                ("{{role}} taking requests", WORKERS))),
            Panel(title="Waiting and running", queries=(
                ("{{serving_baton_dev_role}} waiting",
                 "sum by (serving_baton_dev_role) (baton_engine_queued_requests{<S>})"),
                ("{{serving_baton_dev_role}} running",
                 "sum by (serving_baton_dev_role) (baton_engine_running_requests{<S>})"))),
            Panel(title="Step time and preemptions", unit="ms", queries=(
                ("{{pod}} step", "baton_engine_step_ms{<S>}"),
                ("{{pod}} preemptions/s", "rate(baton_engine_preemptions_total{<S>}[$__rate_interval])"))),
        )),
    ),
)  # fmt: skip

HANDOFF = Dashboard(
    uid="baton-handoff",
    title="Baton / KV handoff",
    text="How KV goes from prefill to decode, what it costs, and what goes wrong.",
    rows=(
        ("Now", (
            Panel(title="Handoff ratio", kind="stat", unit="percentunit", width=6, queries=(("", HANDOFF_RATIO),),
                  text="Part of the attempts whose prompt a prefill worker computed."),
            Panel(title="KV sent", kind="stat", unit="Bps", width=6,
                  queries=(("", rate("baton_kvtransfer_bytes_total", 'direction="out",<S>')),)),
            Panel(title="Exposed tail p90", kind="stat", unit="s", width=6,
                  queries=(quantiles("baton_kvtransfer_exposed_seconds", "<S>")[1],)),
            Panel(title="Damaged chunks, last hour", kind="stat", width=6,
                  queries=(("", "sum(increase(baton_kvtransfer_digest_failures_total{<S>}[1h]))"),)),
        )),
        ("Flow", (
            Panel(title="Handoff ratio", unit="percentunit", most=1, queries=(("ratio", HANDOFF_RATIO),)),
            Panel(title="KV bytes per second", unit="Bps", queries=(
                ("{{pod}} {{direction}} {{wire}}",
                 rate("baton_kvtransfer_bytes_total", by="pod, direction, wire")),)),
            Panel(title="Transfers committed", unit="ops", queries=(
                ("{{direction}}", rate("baton_kvtransfer_committed_total", by="direction")),)),
        )),
        ("Cost", (
            Panel(title="Exposed tail", unit="s", queries=quantiles("baton_kvtransfer_exposed_seconds", "<S>"),
                  text="From the end of prefill to the commit: what the transfer adds to TTFT."),
            Panel(title="Whole handoff", unit="s",
                  queries=quantiles("baton_kvtransfer_handoff_seconds", 'direction="out",<S>')),
            Panel(title="Links and credits", queries=(
                ("links {{direction}}", "sum by (direction) (baton_kvtransfer_links{<S>})"),
                ("free slots", "sum(baton_kvtransfer_free_slots{<S>})"))),
        )),
        ("What goes wrong", (
            Panel(title="Failed transfers", unit="ops", stacked=True, queries=(
                ("{{direction}} {{error}}", rate("baton_kvtransfer_failed_total", by="direction, error")),)),
            Panel(title="Damaged and repeated chunks", unit="ops", queries=(
                ("digest failures", rate("baton_kvtransfer_digest_failures_total")),
                ("resends", rate("baton_kvtransfer_resends_total")))),
            Panel(title="Links cut", unit="ops", queries=(
                ("fences", rate("baton_kvtransfer_fences_total")),
                ("requests waiting for KV", "sum(baton_engine_reserved_requests{<S>})"))),
        )),
        ("Pairs", (
            Panel(title="Rate of each pair", unit="Bps", queries=(
                ("{{pod}} {{direction}} {{peer}}",
                 "sum by (pod, direction, peer) (baton_kvtransfer_pair_bytes_per_second{<S>})"),)),
            Panel(title="Posting a chunk", unit="s", queries=(("{{wire}}", POSTING),),
                  text="Mean time until the wire has taken a chunk that is gathered."),
            Panel(title="Transfers given up", unit="ops", stacked=True, queries=(
                ("{{direction}}", rate("baton_kvtransfer_aborts_total", by="direction")),),
                text="By one of the two sides: the client left, time was over, a worker went away."),
        )),
        ("Back-pressure and moves", (
            Panel(title="Computed and not yet sent", queries=(
                ("{{pod}}", "sum by (pod) (baton_engine_unsent_tokens{<S>})"),),
                text="Tokens whose KV waits for the network. While it stays high, prefill workers compute less."),
            Panel(title="Requests by what they wait for", stacked=True, queries=(
                ("KV of a prefill worker", "sum(baton_engine_reserved_requests{<S>})"),
                ("KV of tiers or of the decode worker", "sum(baton_engine_filling_requests{<S>})"),
                ("the end of their handoff", "sum(baton_engine_sending_requests{<S>})"))),
            Panel(title="Requests that move when a decode worker leaves", unit="ops", stacked=True, queries=(
                ("{{outcome}}", rate("baton_router_migrations_total", by="outcome")),),
                text="moved: nothing was computed twice; refused: it stays for now; failed: it was computed again."),
        )),
    ),
)  # fmt: skip

CACHE = Dashboard(
    uid="baton-cache",
    title="Baton / KV cache tiers",
    text="KV that is kept below the pools: host memory, disk, Mooncake store. Empty without spec.cache.",
    rows=(
        ("Now", (
            Panel(title="Host memory", kind="stat", unit="bytes", width=6,
                  queries=(("", 'sum(baton_tier_stored_bytes{tier="host",<S>})'),)),
            Panel(title="Disk and store", kind="stat", unit="bytes", width=6,
                  queries=(("{{tier}}", 'sum by (tier) (baton_tier_stored_bytes{tier!="host",<S>})'),)),
            Panel(title="Pages of sessions", kind="stat", width=6, queries=(("", "sum(baton_tier_pinned_pages{<S>})"),),
                  text="Kept by clients for the next turn."),
            Panel(title="Tiers that are off", kind="stat", width=6,
                  queries=(("", "sum(max by (pod, tier) (baton_tier_off{<S>}))"),)),
        )),
        ("What it gives", (
            Panel(title="Pages found", unit="ops", stacked=True, queries=(
                ("{{tier}}", rate("baton_tier_hits_total", by="tier")),)),
            Panel(title="Pages asked for and not found", unit="ops", queries=(
                ("{{tier}}", rate("baton_tier_misses_total", by="tier")),),
                text="Every prompt that is new misses; what counts is how often pages are found."),
            Panel(title="Bytes into and out of tiers", unit="Bps", queries=(
                ("{{tier}} {{direction}}", rate("baton_tier_bytes_total", by="tier, direction")),)),
        )),
        ("What is lost", (
            Panel(title="Pages not kept", unit="ops", stacked=True, queries=(
                ("{{tier}} {{reason}}", rate("baton_tier_skipped_total", by="tier, reason")),),
                text="queue: too much to do; room: all of the host pool is in use; refused: the tier has no room."),
            Panel(title="Pages that made room", unit="ops", queries=(
                ("{{tier}}", rate("baton_tier_evictions_total", by="tier")),)),
            Panel(title="Failed calls and damaged pages", unit="ops", queries=(
                ("{{tier}} {{call}} failed", rate("baton_tier_faults_total", by="tier, call")),
                ("{{tier}} damaged", rate("baton_tier_digest_failures_total", by="tier")))),
        )),
    ),
)  # fmt: skip

DASHBOARDS = {"service": OVERVIEW, "handoff": HANDOFF, "cache": CACHE}


def document(board: Dashboard) -> dict[str, Json]:
    """What Grafana imports."""
    panels: list[Json] = []
    top = 0
    for title, row in board.rows:
        place: Json = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place})
        top, left = top + 1, 0
        height = HEIGHT // 2 if all(panel.kind == "stat" for panel in row) else HEIGHT
        for panel in row:
            grid: Json = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": grid})
            left += panel.width
        top += height
    return {
        "uid": board.uid, "title": board.title, "description": board.text, "tags": ["baton"], "schemaVersion": 39,
        "version": 1, "editable": True, "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "timezone": "",
        "templating": {"list": _variables()}, "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel) -> dict[str, Json]:
    custom: Json = {"fillOpacity": 20, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 0}
    defaults: dict[str, Json] = {"unit": panel.unit, "min": 0, "custom": custom if panel.kind == "timeseries" else {}}
    if panel.most is not None:
        defaults["max"] = panel.most
    targets: list[Json] = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": narrowed(query), "legendFormat": legend}
        for number, (legend, query) in enumerate(panel.queries)
    ]
    options: Json = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {
        "type": panel.kind, "title": panel.title, "description": panel.text, "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options, "targets": targets,
    }  # fmt: skip


def narrowed(query: str) -> str:
    for mark, matchers in NARROWED.items():
        query = query.replace(mark, matchers)
    return query


def _variables() -> list[Json]:
    def of_label(name: str, query: str) -> Json:
        return {
            "name": name, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "multi": True,
            "includeAll": True, "sort": 1, "current": {"text": "All", "value": "$__all"},
        }  # fmt: skip

    names = 'label_values(baton_router_inflight{namespace=~"$namespace"}, serving_baton_dev_service)'
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        of_label("namespace", "label_values(baton_router_inflight, namespace)"),
        of_label("service", names),
    ]


def files() -> dict[Path, str]:
    """Every dashboard file with its content."""
    return {
        FOLDER / f"{name}.json": json.dumps(document(board), indent=1, ensure_ascii=False) + "\n"
        for name, board in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
