"""`baton status`: what runs, and what each worker says of itself."""

from __future__ import annotations

from pathlib import Path

import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baton.readiness import Readiness, ask
from baton.state import ServiceState
from baton.view import clock_time, process_table
from baton_proto import worker_pb2, worker_pb2_grpc

_TIMEOUT_S = 2.0
_MIB = 1 << 20
_PAGES = "pages free/cached/leased/in flight"


def show(state: ServiceState, console: Console) -> bool:
    """Print one service. Returns whether it is ready."""
    readiness = ask(state.url, _TIMEOUT_S)
    console.print(f"{state.name}: {state.model} at {state.url}, since {clock_time(state.started_s)}", highlight=False)
    console.print(_verdict(state, readiness), markup=False, highlight=False)
    console.print(process_table(state.processes))
    workers, below = _table("worker", "state", "steps", "running", "queued", _PAGES, "MiB"), _Below()
    for process in state.processes:
        if process.role == "router":
            memory = _resident_bytes(process.pid)
            workers.add_row(process.name, "-", "-", "-", "-", "-", f"{memory / _MIB:.0f}" if memory else "-")
            continue
        reply = _ask(process.address)
        if isinstance(reply, str):
            workers.add_row(process.name, f"no answer ({reply})", "-", "-", "-", "-", "-")
        else:
            workers.add_row(process.name, *_worker_row(reply))
            below.add(process.name, reply)
    console.print(workers)
    below.print(console)
    return readiness.ready


class _Below:
    """What only some workers have: peers, tiers."""

    def __init__(self) -> None:
        self._peers = _table("worker", "peer", "state", "wire", "MiB", "why this wire, why no link")
        self._tiers = _table("worker", "tier", "state", "MiB", "why off")

    def add(self, name: str, reply: worker_pb2.StatusReply) -> None:
        for peer in reply.peers:
            mib = f"{peer.bytes / _MIB:.1f}"
            self._peers.add_row(name, peer.worker_id, peer.state, peer.wire or "-", mib, escape(peer.reason) or "-")
        for tier in reply.tiers:
            mib = f"{tier.bytes / _MIB:.1f}"
            self._tiers.add_row(name, tier.name, tier.state, mib, escape(tier.reason) or "-")

    def print(self, console: Console) -> None:
        for table in (self._peers, self._tiers):
            if table.row_count:
                console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title)
    return table


def _verdict(state: ServiceState, readiness: Readiness) -> str:
    if readiness.ready:
        return "ready"
    return f"not ready ({state.phase.value}): {readiness.reason}"


def _ask(address: str) -> worker_pb2.StatusReply | str:
    """What a worker says of itself, or why it says nothing."""
    with grpc.insecure_channel(address) as channel:
        try:
            reply: worker_pb2.StatusReply = worker_pb2_grpc.AdminStub(channel).Status(
                worker_pb2.StatusRequest(), timeout=_TIMEOUT_S
            )
        except grpc.RpcError as error:
            return error.code().name.lower() if isinstance(error, grpc.Call) else type(error).__name__
    return reply


def _worker_row(reply: worker_pb2.StatusReply) -> tuple[str, ...]:
    pages, load = reply.pages, reply.load
    return (
        reply.state,
        str(load.steps),
        str(load.running),
        str(load.queued_requests),
        f"{pages.free}/{pages.cached}/{pages.leased}/{pages.in_flight} of {pages.total}",
        f"{reply.resident_bytes / _MIB:.0f}",
    )


def _resident_bytes(pid: int) -> int:
    """Of a process on this machine; 0 when it cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
