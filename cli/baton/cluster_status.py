"""`baton status -n NAMESPACE`: reads services and their pods from the API server, once or again and again.

Invariant: what may be read is shown even where the pods may not. Exit status 0 when every service is Ready, 3 when one
is not, 1 when there is none.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.live import Live

from baton.cluster import ClusterFailed, client, credentials, explained
from baton.cluster_report import ServiceReport, reports
from baton.cluster_view import as_json, as_text
from baton_common.kube.client import KubeClient
from baton_common.kube.errors import KubeError
from baton_common.kube.kinds import POD
from baton_common.kube.objects import Object, text
from baton_operator.kinds import INFERENCE_SERVICE
from baton_operator.plan.labels import SERVICE_LABEL, service_selector

EXIT_NOTHING, EXIT_NOT_READY = 1, 3
_EVERY_S = 2.0


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which services. Empty namespace: all of them; empty name: every service there."""

    namespace: str
    name: str = ""

    def __str__(self) -> str:
        return f"namespace {self.namespace}" if self.namespace else "any namespace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`note`: what could not be read, and why; empty = everything could."""

    services: tuple[ServiceReport, ...]
    note: str = ""

    @property
    def status(self) -> int:
        """Of our own exit."""
        if not self.services:
            return EXIT_NOTHING
        return 0 if all(service.ready for service in self.services) else EXIT_NOT_READY


async def look(kube: KubeClient, scope: Scope, *, server: str) -> Found:
    """Raises ClusterFailed when the services cannot be read, or the one that was named does not exist."""
    try:
        services = await kube.list(INFERENCE_SERVICE, scope.namespace)
    except KubeError as error:
        raise explained(error, server=server, where=str(scope)) from None
    if scope.name:
        others = ", ".join(sorted(text(item, "metadata", "name") for item in services)) or "none"
        services = tuple(item for item in services if text(item, "metadata", "name") == scope.name)
        if not services:
            raise ClusterFailed(f"no InferenceService {scope.name} in {scope}; there are: {others}")
    pods: tuple[Object, ...] = ()
    note = ""
    try:
        selector = service_selector(scope.name) if scope.name else SERVICE_LABEL
        pods = await kube.list(POD, scope.namespace, selector=selector) if services else ()
    except KubeError as error:
        if error.status != 403:
            raise explained(error, server=server, where=str(scope)) from None
        note = f"the pods may not be read: {error.message}; ask for list on pods in {scope}"
    return Found(services=reports(services, pods), note=note)


def run(
    scope: Scope, *, kubeconfig: Path | None, environment: Mapping[str, str], home: Path, output: Output, watch: bool,
    console: Console,
) -> int:  # fmt: skip
    """Print what there is. Returns the exit status; with `watch` only Ctrl-C ends it."""
    where = credentials(kubeconfig, environment, home=home)

    async def once() -> Found:
        async with client(where) as kube:
            return await look(kube, scope, server=where.server)

    async def for_ever() -> None:
        async with client(where) as kube:
            await _watch(kube, scope, where.server, output, console)

    if watch:
        asyncio.run(for_ever())
        return 0
    found = asyncio.run(once())
    if output is Output.JSON:
        sys.stdout.write(as_json(found.services) + "\n")
    else:
        _print(found, scope, console)
    _tell(found.note)
    return found.status


async def _watch(kube: KubeClient, scope: Scope, server: str, output: Output, console: Console) -> None:
    """On a terminal one picture that stays up to date; elsewhere a new one for every change."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal and output is Output.TEXT else None
    with live or nullcontext():
        last: Sequence[ServiceReport] | None = None
        told = ""
        while True:
            problem = ""
            try:
                found = await look(kube, scope, server=server)
                problem = found.note
                if found.services != last:
                    _show(found, scope, output, console, live)
                last = found.services
            except ClusterFailed as error:
                if last is None:
                    raise
                problem = error.message  # it may pass: keep watching
            if problem != told:
                _tell(problem)
            told = problem
            await asyncio.sleep(_EVERY_S)


def _show(found: Found, scope: Scope, output: Output, console: Console, live: Live | None) -> None:
    if output is Output.JSON:
        sys.stdout.write(as_json(found.services, indent=None) + "\n")
        sys.stdout.flush()
    elif live is not None and found.services:
        live.update(as_text(found.services), refresh=True)
    else:
        _print(found, scope, console)


def _print(found: Found, scope: Scope, console: Console) -> None:
    if found.services:
        console.print(as_text(found.services))
    else:
        target = f"-n {scope.namespace}" if scope.namespace else "-n NAMESPACE"
        console.print(
            f"no InferenceService in {scope}; kubectl apply {target} -f docs/samples/cpu-demo.yaml makes one",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _tell(problem: str) -> None:
    if problem:
        sys.stderr.write(f"baton: {problem}\n")
