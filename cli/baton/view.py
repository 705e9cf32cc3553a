"""Shows a service to a person: a live table on a terminal, one line per change elsewhere. Told states, asks nothing."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.state import Life, Phase, ProcessState, ServiceState

_NOTE_CHARS = 200
_COLOURS = {
    Phase.STARTING: "yellow", Phase.READY: "green", Phase.DEGRADED: "yellow", Phase.STOPPING: "yellow",
    Phase.STOPPED: "dim", Phase.FAILED: "red",
}  # fmt: skip


class View(Protocol):
    """A context manager that is shown every state of one service, in order."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, state: ServiceState) -> None: ...


def example(state: ServiceState) -> str:
    """A command to paste."""
    body = f'{{"model": "{state.model}", "messages": [{{"role": "user", "content": "Hello! What are you?"}}]}}'
    return f"curl {state.url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def name_flag(name: str, default: str) -> str:
    return "" if name == default else f" --name {name}"


class Lines:
    """For logs, pipes and `make`: prints what changed since the state before."""

    def __init__(self, console: Console, *, hint: str = "") -> None:
        self._console = console
        self._hint = hint            # what to type next, printed once the service is ready
        self._last: ServiceState | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, state: ServiceState) -> None:
        last, self._last = self._last, state
        if last is None and state.processes:
            self._print(f"serving {state.model}; logs are in {Path(state.processes[0].log).parent}")
        before = {process.name: process for process in last.processes} if last else {}
        for process in state.processes:
            if line := _change(before.get(process.name), process):
                self._print(line)
        if last is None or (state.phase, state.note) != (last.phase, last.note):
            self._phase(state)

    def _phase(self, state: ServiceState) -> None:
        if state.phase is Phase.READY:
            self.ready(state)
        elif state.note:
            self._print(f"{state.phase.value}: {shorten(state.note, _NOTE_CHARS, placeholder=' …')}")
        elif state.phase is not Phase.STARTING:
            self._print(state.phase.value)

    def ready(self, state: ServiceState) -> None:
        """Where it is, and what to type."""
        self._print(f"ready: {state.url}")
        self._console.print(f"\n  {example(state)}\n{self._hint}", markup=False, highlight=False, soft_wrap=True)

    def _print(self, text: str) -> None:
        self._console.print(f"baton: {text}", markup=False, highlight=False, soft_wrap=True)


def _change(old: ProcessState | None, new: ProcessState) -> str:
    if old is not None and (old.life, old.pid) == (new.life, new.pid):
        return ""
    if new.life is Life.RUNNING and new.pid:
        again = f" again (restart {new.restarts})" if new.restarts else ""
        return f"{new.name} started{again}, pid {new.pid}, {new.address}"
    if new.life is Life.RESTARTING:
        return f"{new.name} ended {new.last_exit}; starting it again, log: {new.log}"
    if new.life is Life.STOPPED and old is not None and old.life is not Life.STOPPED:
        return f"{new.name} stopped"
    return ""


class Board:
    """For terminals: one table that stays in place, and under it what to do next."""

    def __init__(self, console: Console, *, hint: str = "") -> None:
        self._hint = hint
        self._live = Live(Text(""), console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, state: ServiceState) -> None:
        headline = Text.assemble(
            (f"{state.name} ", "bold"), f"{state.model}  ", (state.phase.value, _COLOURS[state.phase]),
            f"  {state.url if state.phase is Phase.READY else state.note}",
        )  # fmt: skip
        parts: list[Text | Table] = [headline, process_table(state.processes)]
        if state.phase is Phase.READY:
            parts.append(Text(f"{example(state)}\n{self._hint}Ctrl-C stops everything"))
        self._live.update(Group(*parts), refresh=True)


def process_table(processes: tuple[ProcessState, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("process", "state", "pid", "address", "restarts", "last end"):
        table.add_column(title)
    for process in processes:
        pid = str(process.pid) if process.pid else "-"
        row = (process.name, process.life.value, pid, process.address, str(process.restarts), process.last_exit or "-")
        table.add_row(*row)
    return table


def clock_time(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))
