"""Keeps a fixed set of processes running until told to stop.

One task per process, and that task alone starts, watches and restarts it. A process that ends by itself is started
again after a pause that doubles; one that ends with CONFIG_EXIT, or too often in a row, makes the supervisor give up,
because the same start would fail again. Stopping goes by waves, the router before its workers: SIGTERM, a grace,
SIGKILL. Invariant: when `run` returns or raises, none of the processes exists. Knows nothing of roles or models.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from baton import launcher
from baton.state import Life, ProcessState
from baton_common.clock import Clock
from baton_common.errors import BatonError

CONFIG_EXIT = 2
_TAIL_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One process to keep running."""

    name: str
    role: str
    argv: tuple[str, ...]             # argv[0] is the path of the program
    environment: Mapping[str, str]    # the whole of it
    address: str
    log: Path
    wave: int                         # processes of a lower wave are stopped first


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to restart, and how long to wait for a stop."""

    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0
    stable_s: float = 30.0      # a process that lived so long starts with the first pause again
    crashes: int = 6            # so many in a row, each sooner than stable_s: give up
    grace_s: float = 35.0       # per wave, between SIGTERM and SIGKILL; longer than the drain of a worker


class GaveUp(BatonError):
    """A process cannot be kept running; the message names it and ends with its last line."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status    # for our own exit


class Supervisor:
    """Use once: `await run()`; `stop()` from the same loop ends it."""

    def __init__(
        self, commands: Sequence[Command], policy: Policy, clock: Clock, changed: Callable[[], None]
    ) -> None:
        self._commands = tuple(commands)
        self._policy = policy
        self._clock = clock
        self._changed = changed    # called after each change of `states`, on the loop; must not block
        self._states = {
            command.name: ProcessState(
                name=command.name, role=command.role, address=command.address, log=str(command.log)
            )
            for command in commands
        }
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    @property
    def states(self) -> tuple[ProcessState, ...]:
        return tuple(self._states.values())

    def stop(self, *, now: bool = False) -> None:
        """End all processes; `now` skips the grace. Returns at once."""
        self._stop.set()
        if now:
            self._now.set()

    async def run(self) -> None:
        """Returns when everything has stopped after `stop`. Raises GaveUp, then too with everything stopped."""
        keepers = [asyncio.create_task(self._keep(command), name=command.name) for command in self._commands]
        stop = asyncio.create_task(_until(self._stop))
        try:
            await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop.set()
            await self._stop_waves()
            stop.cancel()
            results = await asyncio.gather(*keepers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _keep(self, command: Command) -> None:
        crashes = 0
        while not self._stop.is_set():
            started_s, log_begin = self._clock.now(), _size(command.log)
            status = await self._run_once(command)
            if self._stop.is_set():
                break
            if status == CONFIG_EXIT:
                reason = last_line(command.log, log_begin)
                raise GaveUp(f"{command.name} refuses to start: {reason}", status=CONFIG_EXIT)
            crashes = crashes + 1 if self._clock.now() - started_s < self._policy.stable_s else 1
            how = _describe(status)
            if crashes >= self._policy.crashes:
                reason = last_line(command.log, log_begin)
                raise GaveUp(f"{command.name} ended {crashes} times, {how}: {reason}", status=1)
            self._update(
                command, life=Life.RESTARTING, last_exit=how, restarts=self._states[command.name].restarts + 1
            )
            pause_s = min(self._policy.first_pause_s * 2 ** (crashes - 1), self._policy.longest_pause_s)
            await _wait(self._stop, pause_s)
        self._update(command, life=Life.STOPPED)

    async def _run_once(self, command: Command) -> int:
        """Start the process and wait for its end. Returns its exit status, negative for a signal."""
        with command.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command.argv,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=dict(command.environment),
                start_new_session=True,    # a Ctrl-C in the terminal reaches us alone, and we stop them in order
            )  # fmt: skip
        self._processes[command.name] = process
        self._update(command, life=Life.RUNNING, pid=process.pid)
        if self._stop.is_set():    # too late for its wave, and it has no work yet
            _signal(process, signal.SIGKILL)
        try:
            return await process.wait()
        finally:
            del self._processes[command.name]
            self._update(command, pid=0)

    async def _stop_waves(self) -> None:
        for wave in sorted({command.wave for command in self._commands}):
            names = [command.name for command in self._commands if command.wave == wave]
            ending = [process for name in names if (process := self._processes.get(name)) is not None]
            for process in ending:
                _signal(process, signal.SIGTERM)
            exits = asyncio.create_task(_ended(ending))
            hurry = asyncio.create_task(_until(self._now))
            await asyncio.wait([exits, hurry], timeout=self._policy.grace_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            for process in ending:
                _signal(process, signal.SIGKILL)
            await exits

    def _update(
        self,
        command: Command,
        *,
        life: Life | None = None,
        pid: int | None = None,
        restarts: int | None = None,
        last_exit: str | None = None,
    ) -> None:
        old = self._states[command.name]
        self._states[command.name] = replace(
            old,
            life=old.life if life is None else life,
            pid=old.pid if pid is None else pid,
            restarts=old.restarts if restarts is None else restarts,
            last_exit=old.last_exit if last_exit is None else last_exit,
        )
        self._changed()


def last_line(log: Path, begin: int = 0) -> str:
    """The last line that says something, of what a log holds from byte `begin` on."""
    with log.open("rb") as file:
        file.seek(max(begin, _size(log) - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), f"(no output in {log})")


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            return    # it ended between the two lines


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _ended(processes: Sequence[asyncio.subprocess.Process]) -> None:
    await asyncio.gather(*(process.wait() for process in processes))


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return
