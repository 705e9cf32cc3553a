"""Workers that die, stop or hold still by their own hand when one of their transfers gets to a named point.

So each point is really reached, whatever the machine does meanwhile. A test sets a `Trap`; until then the worker is an
ordinary one. Points of a handoff, of prefill's transfers and of decode's: "b" one gets to state b, "a>b" it does so
from state a; "expected" decode waits for one from now on. Points of a pull, where decode sends: "pushed N" chunks,
"landed N" chunks at prefill.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from support.processes import Service, WorkerProcess, free_ports

from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.incoming import Incoming
from baton_kvtransfer.outgoing import Outgoing
from baton_kvtransfer.receiving import Receiver
from baton_kvtransfer.sending import Sender
from baton_kvtransfer.transfer import Transfer

Action = Literal["die", "stop", "hold"]
SIGNALS = {"die": signal.SIGKILL, "stop": signal.SIGSTOP}
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from baton_{role}.main import main
from support.pd_victim import watch
watch({role!r}, {folder!r})
main()
"""


class Trap:
    """For one worker; it springs once and is then gone."""

    def __init__(self, folder: Path, role: str) -> None:
        self._set, self._sprung = folder / f"{role}.trap", folder / f"{role}.sprung"
        self._endless = folder / f"{role}.endless"

    # ---- the test's side --------------------------------------------------------------------------------------------
    def set(self, action: Action, point: str) -> None:
        self._sprung.unlink(missing_ok=True)
        whole = self._set.with_suffix(".new")
        whole.write_text(f"{action} {point}")
        whole.rename(self._set)

    @property
    def sprung(self) -> bool:
        return self._sprung.exists()

    def let_go(self) -> None:
        """What it holds goes on; without, the trap is taken away."""
        self._set.unlink(missing_ok=True)
        self._sprung.unlink(missing_ok=True)

    @contextmanager
    def endless(self) -> Iterator[None]:
        """Meanwhile the worker never says that all KV of a handoff was announced: only an abort or a loss ends one."""
        self._endless.touch()
        try:
            yield
        finally:
            self._endless.unlink()

    # ---- the worker's side ------------------------------------------------------------------------------------------
    @property
    def is_endless(self) -> bool:
        return self._endless.exists()

    def reached(self, *points: str) -> None:
        if not self._set.exists():
            return
        action, _, point = self._set.read_text().partition(" ")
        if point not in points:
            return
        self._set.rename(self._sprung)
        if action in SIGNALS:  # to this thread: one to the process lets it run on until another thread was woken
            signal.pthread_kill(threading.get_ident(), SIGNALS[action])
        while action == "hold" and self._sprung.exists():
            time.sleep(0.005)


@contextmanager
def victims(folder: Path, checkpoint: Path, **settings: Any) -> Iterator[Service]:
    """A prefill and a decode worker that traps work on; each keeps its name when it is started again."""
    tests = str(Path(__file__).parents[1])
    workers = []
    for role, port in zip(("prefill", "decode"), free_ports(2), strict=True):
        code = PROGRAM.format(tests=tests, role=role, folder=str(folder))
        workers.append(WorkerProcess(role, checkpoint, folder, code=code, listen=f"127.0.0.1:{port}", **settings))
    prefill, decode = workers
    with prefill, decode:
        for worker in workers:
            worker.wait_ready()
        yield Service(prefill=(prefill,), decode=(decode,), colocated=(), router=None)


# ---- the program ----------------------------------------------------------------------------------------------------
def watch(role: str, folder: str) -> None:
    trap = Trap(Path(folder), role)
    if role == "prefill":
        _prefill(trap)
        _states(Outgoing, trap)
    else:
        _decode(trap)
        _states(Incoming, trap)


def _prefill(trap: Trap) -> None:
    finish, landed = Transfer.finish, Receiver.landed

    def finished(self: Transfer, *arguments: Any) -> None:
        if not trap.is_endless:
            finish(self, *arguments)

    def land(self: Receiver, landing: Any, *arguments: Any) -> None:
        landed(self, landing, *arguments)
        trap.reached(f"landed {landing.chunk.sequence + 1}")

    Transfer.finish, Receiver.landed = finished, land


def _decode(trap: Trap) -> None:
    add, pushed = Expectations.add, Sender.pushed

    def expect(self: Expectations, *arguments: Any) -> None:
        add(self, *arguments)
        trap.reached("expected")

    def push(self: Sender, each: Any, *arguments: Any) -> None:
        pushed(self, each, *arguments)
        trap.reached(f"pushed {each.chunk.sequence + 1}")

    Expectations.add, Sender.pushed = expect, push


def _states(record: Any, trap: Trap) -> None:
    """`record`: class of transfers."""
    make, advance = record.__init__, record.advance

    def begin(self: Any, *arguments: Any, **more: Any) -> None:
        make(self, *arguments, **more)
        trap.reached(self.state.value)

    def step(self: Any, to: Any) -> None:
        before = self.state.value
        advance(self, to)
        trap.reached(f"{before}>{to.value}", to.value)

    record.__init__, record.advance = begin, step
