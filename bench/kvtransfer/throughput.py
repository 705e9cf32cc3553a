"""Rows of bulk transfers: our wires against what the machine can do, and against the libraries used directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bench.kvtransfer.arena import Series, add_row, compete
from bench.kvtransfer.contenders import Contender, OurWire
from bench.kvtransfer.peers import mooncake, nixl
from bench.kvtransfer.peers.host import Memmove, raw_socket, vm_writev
from bench.kvtransfer.shapes import KIB_4, KIB_64, LLAMA, MIB_1, RING, Shape
from bench.report import Report, Row

SLICE_S = 0.15
TCP_ONLY = {"UCX_TLS": "tcp"}
GOALS = {  # shape -> fractions without and with digest
    ("shm", KIB_4.name): (0.80, 0.58),
    ("shm", KIB_64.name): (0.90, 0.65),
    ("shm", MIB_1.name): (0.90, 0.65),
    ("tcp", KIB_4.name): (0.90, 0.75),
    ("tcp", KIB_64.name): (0.90, 0.75),
    ("tcp", MIB_1.name): (0.90, 0.75),
}
CPU_GOAL_S_PER_GB = 0.40
CEILINGS = {"shm": "memmove", "tcp": "TCP socket"}


def rounds_of(seconds: float) -> int:
    return max(3, round(seconds / SLICE_S))


def wires(report: Report, seconds: float, shapes: Sequence[Shape] = (KIB_4, KIB_64, MIB_1)) -> None:
    """shm and tcp with and without digest, each against its ceiling."""
    for shape in shapes:
        makers: list[Callable[[], Contender]] = [partial(Memmove, shape), partial(raw_socket, shape)]
        makers += [partial(OurWire, wire, shape, digest=digest) for wire in CEILINGS for digest in (False, True)]
        found = compete(makers, rounds=rounds_of(seconds), slice_s=SLICE_S)
        _wire_rows(report, shape, found)
        if shape is KIB_64:
            _cpu_row(report, found["shm, xxh3"])


def llama(report: Report, seconds: float) -> None:
    """The pool of a real model over the same wires."""
    wires(report, seconds, (LLAMA,))


def _wire_rows(report: Report, shape: Shape, found: dict[str, Series]) -> None:
    for wire, ceiling in CEILINGS.items():
        goals = GOALS.get((wire, shape.name), (None, None))
        for digest, goal in zip(("no digest", "xxh3"), goals, strict=True):
            name = f"{wire}, {digest}"
            add_row(report, f"{wire}, {shape.name}, {digest}", found, name, ceiling, goal)


def _cpu_row(report: Report, series: Series) -> None:
    report.add(
        Row(name="shm, 64 KiB, xxh3: processors, both sides", value=series.cpu_s_per_gb, unit="s/GB",
            goal=CPU_GOAL_S_PER_GB, lower_is_better=True, note=series.note)
    )  # fmt: skip


def peers_4k(report: Report, seconds: float) -> None:
    peers(report, seconds, (KIB_4,))


def peers_64k(report: Report, seconds: float) -> None:
    peers(report, seconds, (KIB_64,))


def peers_1m(report: Report, seconds: float) -> None:
    peers(report, seconds, (MIB_1,))
    makers: list[Callable[[], Contender]] = [partial(vm_writev, RING), partial(nixl.Slots, RING)]
    found = compete(makers, rounds=rounds_of(seconds), slice_s=SLICE_S)
    add_row(report, "nixl engine, push of slots", found, "our NIXL engine", "process_vm_writev", 0.95)


def peers(report: Report, seconds: float, shapes: Sequence[Shape]) -> None:
    """Libraries used directly, one descriptor per page, beside our wires over the same transports."""
    for shape in shapes:
        makers: list[Callable[[], Contender]] = [
            partial(Memmove, shape),
            partial(vm_writev, shape),
            partial(raw_socket, shape),
            partial(nixl.Direct, shape, tls="", shipped=False),
            partial(nixl.Direct, shape, tls="", shipped=True),
            partial(nixl.Direct, shape, tls="tcp", shipped=False),
            partial(nixl.Direct, shape, tls="tcp", shipped=True),
            partial(mooncake.direct, shape),
            partial(OurWire, "tcp", shape, digest=True),
            partial(OurWire, "nixl", shape, digest=True),
            partial(OurWire, "nixl", shape, digest=True, environment=TCP_ONLY, label="nixl over tcp"),
            partial(OurWire, "mooncake", shape, digest=True),
        ]
        found = compete(makers, rounds=rounds_of(seconds * 0.6), slice_s=SLICE_S)
        _peer_rows(report, shape, found)


def _peer_rows(report: Report, shape: Shape, found: dict[str, Series]) -> None:
    small = shape is KIB_4
    for name in ("process_vm_writev", "TCP socket", "NIXL cma, best", "NIXL cma, as shipped", "NIXL tcp, best",
                 "NIXL tcp, as shipped", "Mooncake tcp"):  # fmt: skip
        add_row(report, f"{name}, {shape.name}", found, name, "memmove")
    add_row(report, f"wire tcp, {shape.name}", found, "tcp, xxh3", "NIXL tcp, best", 2.5 if small else None)
    add_row(report, f"wire tcp, {shape.name}", found, "tcp, xxh3", "NIXL tcp, as shipped", 4.0 if small else None)
    add_row(report, f"wire tcp, {shape.name}", found, "tcp, xxh3", "Mooncake tcp")
    add_row(report, f"wire nixl (cma), {shape.name}", found, "nixl, xxh3", "NIXL cma, best", 1.4 if small else None)
    add_row(report, f"wire nixl over tcp, {shape.name}", found, "nixl over tcp, xxh3", "NIXL tcp, best")
    add_row(report, f"wire mooncake, {shape.name}", found, "mooncake, xxh3", "Mooncake tcp")
