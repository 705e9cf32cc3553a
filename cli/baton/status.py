"""`baton status`: what runs, and what each worker says of itself."""

from __future__ import annotations

from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from baton.readiness import Readiness, ask
from baton.state import ServiceState
from baton.view import clock_time, process_table
from baton_proto import worker_pb2, worker_pb2_grpc

_TIMEOUT_S = 2.0
_MIB = 1 << 20


def show(state: ServiceState, console: Console) -> bool:
    """Print one service. Returns whether it is ready."""
    readiness = ask(state.url, _TIMEOUT_S)
    console.print(f"{state.name}: {state.model} at {state.url}, since {clock_time(state.started_s)}", highlight=False)
    console.print(_verdict(state, readiness), markup=False, highlight=False)
    console.print(process_table(state.processes))
    table = Table(box=None, pad_edge=False)
    pages = "pages free/cached/leased/in flight"
    for title in ("worker", "state", "steps", "running", "queued", pages, "peers", "MiB"):
        table.add_column(title)
    for process in state.processes:
        if process.role == "router":
            memory = _resident_bytes(process.pid)
            table.add_row(process.name, "-", "-", "-", "-", "-", "-", f"{memory / _MIB:.0f}" if memory else "-")
        else:
            table.add_row(process.name, *_worker_row(process.address))
    console.print(table)
    return readiness.ready


def _verdict(state: ServiceState, readiness: Readiness) -> str:
    if readiness.ready:
        return "ready"
    return f"not ready ({state.phase.value}): {readiness.reason}"


def _worker_row(address: str) -> tuple[str, ...]:
    with grpc.insecure_channel(address) as channel:
        try:
            reply = worker_pb2_grpc.AdminStub(channel).Status(worker_pb2.StatusRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code().name.lower() if isinstance(error, grpc.Call) else type(error).__name__
            return (f"no answer ({code})", "-", "-", "-", "-", "-", "-")
    pages, load = reply.pages, reply.load
    return (
        reply.state,
        str(load.steps),
        str(load.running),
        str(load.queued_requests),
        f"{pages.free}/{pages.cached}/{pages.leased}/{pages.in_flight} of {pages.total}",
        ", ".join(f"{peer.worker_id} {peer.wire} {peer.state}" for peer in reply.peers) or "-",
        f"{reply.resident_bytes / _MIB:.0f}",
    )


def _resident_bytes(pid: int) -> int:
    """Of a process on this machine; 0 when it cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
