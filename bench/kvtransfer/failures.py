"""Rows of peers that die or fall silent, and of endpoints that have nothing to do."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

from bench.kvtransfer.node import Node
from bench.kvtransfer.peers import nixl
from bench.kvtransfer.remote import Remote, RemoteFailed
from bench.kvtransfer.shapes import Shape, plain
from bench.report import Report, Row

WIRES = ("shm", "tcp", "nixl", "mooncake")
SHAPE = plain("32 MiB", layers=8, page_tokens=128, dim=256, pages=64)  # several chunks of any size
KILLS = 3
IDLE_S = 3.0
RESET_GOAL_MS, SILENCE_GOAL_S, USABLE_GOAL_S, IDLE_GOAL_PERCENT = 200.0, 3.5, 1.0, 2.0
_PAUSE_S = 0.3


class HalfSent:
    """A transfer of which half is announced and a part has arrived; who dies now dies in the middle of it."""

    def __init__(self, wire: str, *, sender: str = "p") -> None:
        self.wire = wire
        self.far = Remote(Node, "d", wire, SHAPE, True, 0)
        try:
            self.near = Remote(Node, sender, wire, SHAPE, True, 5)
        except RemoteFailed:
            self.far.close()
            raise
        self.address = self.far.call("address")
        begin(self.near, self.far, self.address, SHAPE)
        self.near.call("ready", "1", SHAPE.layout.layers, SHAPE.tokens // 2)
        while not self.far.call("moved_bytes"):
            time.sleep(0.005)

    def close(self) -> None:
        self.near.close()
        self.far.close()


def begin(near: Remote, far: Remote, address: str, shape: Shape, name: str = "1") -> None:
    far.call("expect", name, shape.pages)
    near.call("open", name, shape.pages, address, "d-1")


def usable_wires(make: Callable[[str], HalfSent]) -> list[HalfSent]:
    made = []
    for wire in WIRES:
        try:
            made.append(make(wire))
        except RemoteFailed as error:
            print(f"  {wire} is left out: {str(error).strip().splitlines()[-1]}", flush=True)
    return made


def killed(report: Report, seconds: float) -> None:
    """kill -9 of each end in the middle of a transfer: how long until the other's owner is told."""
    for victim in ("receiver", "sender"):
        took: dict[str, list[float]] = {}
        for _ in range(KILLS):
            for pair in usable_wires(HalfSent):
                dead, owner = (pair.far, pair.near) if victim == "receiver" else (pair.near, pair.far)
                owner.tell("wait", "1")
                killed_s = time.monotonic()
                dead.signal(signal.SIGKILL)
                kind, at_s = owner.hear()
                if kind == "Receipt":
                    raise RuntimeError("a transfer to a dead process cannot end well")
                took.setdefault(pair.wire, []).append((at_s - killed_s) * 1e3)
                pair.close()
        for wire, values in took.items():
            report.add(
                Row(name=f"kill -9 of the {victim}, {wire}: to the error", value=statistics.median(values), unit="ms",
                    goal=RESET_GOAL_MS, lower_is_better=True, note=f"of {len(values)}, longest {max(values):.1f}")
            )  # fmt: skip


def stopped(report: Report, seconds: float) -> None:
    """SIGSTOP of each end, all wires at once: until the error, and until the receiver has served another sender."""
    for victim in ("receiver", "sender"):
        with ExitStack() as stack:
            pairs = usable_wires(HalfSent)
            for pair in pairs:
                stack.callback(pair.close)
            others = {pair.wire: Remote(Node, "other", pair.wire, SHAPE, True, 9) for pair in pairs}
            for other in others.values():
                stack.callback(other.close)
            stopped_s = time.monotonic()
            for pair in pairs:
                (pair.far if victim == "receiver" else pair.near).freeze()
                (pair.near if victim == "receiver" else pair.far).tell("wait", "1")
            for pair in pairs:
                _, at_s = (pair.near if victim == "receiver" else pair.far).hear()
                report.add(
                    Row(name=f"SIGSTOP of the {victim}, {pair.wire}: to the error", value=at_s - stopped_s, unit="s",
                        goal=SILENCE_GOAL_S, lower_is_better=True)
                )  # fmt: skip
                if victim == "sender":
                    _serves_again(report, pair, others[pair.wire])


def _serves_again(report: Report, pair: HalfSent, other: Remote) -> None:
    begin_s = time.monotonic()
    begin(other, pair.far, pair.address, SHAPE, "2")
    _, receipt_s = other.call("send", "2", SHAPE.pages)
    report.add(
        Row(name=f"after that error, {pair.wire}: 32 MiB from another sender", value=receipt_s - begin_s, unit="s",
            goal=USABLE_GOAL_S, lower_is_better=True)
    )  # fmt: skip


def idle(report: Report, seconds: float) -> None:
    """Processor time of endpoints whose link is up and has nothing to do; the worse end."""
    pairs = usable_wires(HalfSent)
    try:
        for pair in pairs:
            pair.near.call("ready", "1", SHAPE.layout.layers, SHAPE.tokens)
            pair.near.call("finish", "1")
            pair.near.call("wait", "1")
        time.sleep(_PAUSE_S)
        before = [[end.cpu_s() for end in (pair.near, pair.far)] for pair in pairs]
        begin_s = time.monotonic()
        time.sleep(IDLE_S)
        wall_s = time.monotonic() - begin_s
        for pair, (near_s, far_s) in zip(pairs, before, strict=True):
            used = max(pair.near.cpu_s() - near_s, pair.far.cpu_s() - far_s) / wall_s
            report.add(
                Row(name=f"idle endpoint, {pair.wire}", value=used * 100, unit="% core", goal=IDLE_GOAL_PERCENT,
                    lower_is_better=True, note="link up; the worse end")
            )  # fmt: skip
    finally:
        for pair in pairs:
            pair.close()
    _idle_peer(report)


def _idle_peer(report: Report) -> None:
    try:
        agent = Remote(nixl.Agent, SHAPE, 0, True, 0)
    except RemoteFailed:
        return
    before_s, begin_s = agent.cpu_s(), time.monotonic()
    time.sleep(1.0)
    used = (agent.cpu_s() - before_s) / (time.monotonic() - begin_s)
    agent.close()
    report.add(Row(name="idle agent, NIXL as shipped", value=used * 100, unit="% core"))


def measure(report: Report, seconds: float) -> None:
    killed(report, seconds)
    stopped(report, seconds)
