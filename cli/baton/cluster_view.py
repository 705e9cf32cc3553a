"""Shows services of a cluster: one row each, and everything known about those that are not Ready, or that one asks for.

Text for people, JSON for programs. Told reports, asks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Group
from rich.table import Table
from rich.text import Text

from baton.cluster_report import ServiceReport


def as_json(services: Sequence[ServiceReport], *, indent: int | None = 1) -> str:
    """{"services": [...]}, each with the fields of ServiceReport."""
    return json.dumps({"services": [asdict(service) for service in services]}, indent=indent)


def as_text(services: Sequence[ServiceReport]) -> Group:
    """A single service whole; of several a table, then whole what is not Ready."""
    if len(services) == 1:
        return _whole(services[0])
    parts: list[Table | Text | Group] = [_overview(services)]
    for service in services:
        if not service.ready:
            parts += [Text(""), _whole(service)]
    return Group(*parts)


def _overview(services: Sequence[ServiceReport]) -> Table:
    table = _table("namespace", "name", "ready", "prefill", "decode", "colocated", "router", "url")
    for service in services:
        pools = {pool.role: f"{pool.ready}/{pool.desired}" for pool in service.pools}
        _row(
            table, service.namespace, service.name, "yes" if service.ready else service.reason,
            *(pools.get(role, "-") for role in ("prefill", "decode", "colocated", "router")), service.url or "-",
        )  # fmt: skip
    return table


def _whole(service: ServiceReport) -> Group:
    parts: list[Table | Text] = [_headline(service)]
    if not service.ready:
        parts.append(Text(f"why: {service.message or 'not said'}"))
    facts = [service.model, f"profile {service.profile}", _revisions(service), service.url]
    parts += [Text(", ".join(fact for fact in facts if fact)), Text("")]
    if service.pools:
        parts += [_pools(service), Text("")]
    if service.conditions:
        parts += [_conditions(service)]
    if any(not pod.ready or pod.reason for pod in service.pods):
        parts += [Text(""), _pods(service)]
    if any(pod.transport for pod in service.pods):
        parts += [Text(""), _transport(service)]
    return Group(*parts)


def _headline(service: ServiceReport) -> Text:
    verdict, colour = ("Ready", "green") if service.ready else (f"not Ready: {service.reason}", "red")
    since = f", since {service.since}" if service.since else ""
    return Text.assemble((service.name, "bold"), f" in {service.namespace}: ", (verdict, colour), since)


def _revisions(service: ServiceReport) -> str:
    current, updated = service.current_revision, service.updated_revision
    if not updated:
        return ""
    return f"revision {updated}" if current == updated else f"revision {current or '(none yet)'} -> {updated}"


def _pools(service: ServiceReport) -> Table:
    table = _table("role", "desired", "updated", "ready", "routable")
    for pool in service.pools:
        _row(table, pool.role, *(str(count) for count in (pool.desired, pool.updated, pool.ready, pool.routable)))
    return table


def _conditions(service: ServiceReport) -> Table:
    table = _table("condition", "status", "reason", "message")
    for item in service.conditions:
        _row(table, item.type, item.status, item.reason, item.message)
    return table


def _pods(service: ServiceReport) -> Table:
    table = _table("pod", "role", "revision", "state", "restarts", "why not ready")
    for pod in service.pods:
        if not pod.ready or pod.reason:
            why = f"{pod.reason}: {pod.message}" if pod.reason else "-"
            _row(table, pod.name, pod.role, pod.revision, pod.state, str(pod.restarts), why)
    return table


def _transport(service: ServiceReport) -> Table:
    table = _table("prefill pod", "KV transport, as probed")
    for pod in service.pods:
        if pod.transport:
            _row(table, pod.name, pod.transport)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title)
    return table


def _row(table: Table, *cells: str) -> None:
    """As they are: what a cluster says is no markup."""
    table.add_row(*(Text(cell, overflow="fold") for cell in cells))
