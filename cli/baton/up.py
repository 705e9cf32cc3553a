"""`baton up` and `baton down`: who supervises, and how a service is asked to end.

In the foreground this process is the supervisor. Detached, a second one in a session of its own is, and this one
watches its state file until the service is ready.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from baton.errors import StartFailed
from baton.request import UpOptions, deployment, service_name
from baton.service import Machine, Service, prepare
from baton.state import DEFAULT_NAME, Phase, ServiceState, StateDir, state_dir
from baton.supervisor import Policy, last_line
from baton.view import Board, Lines, View, name_flag
from baton_common.clock import SystemClock
from baton_common.errors import ConfigError

_POLL_S = 0.1
_DOWN_TIMEOUT_S = 90.0


def machine(environment: Mapping[str, str]) -> Machine:
    """This one. The programs are those installed beside the running interpreter."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Machine(scripts=Path(sys.executable).parent, cores=cores, environment=environment)


def foreground(
    options: UpOptions, *, home: Path, environment: Mapping[str, str], console: Console, ready_timeout_s: float
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit status."""
    folder = state_dir(home, service_name(options, DEFAULT_NAME))
    with folder.locked():
        folder.forget()
        wanted = deployment(options)
        commands = prepare(wanted, folder, machine(environment))
        view = _view(folder.name, console)
        with view:
            service = Service(
                folder=folder, model=wanted.served_name, url=wanted.url, commands=commands, policy=Policy(),
                clock=SystemClock(), pid=os.getpid(), started_s=time.time(), view=view.show,
                ready_timeout_s=ready_timeout_s,
            )  # fmt: skip
            status = asyncio.run(_until_signal(service))
    state = folder.read()
    if state is not None and state.phase is Phase.FAILED:
        raise StartFailed(state.note, status=status)
    return status


async def _until_signal(service: Service) -> int:
    """A first signal stops the service gently, a second one at once."""
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        service.stop(now=signals > 1)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:    # nohup wants us to stay
            loop.add_signal_handler(number, stop)
    return await service.run()


def detached(
    options: UpOptions, *, home: Path, environment: Mapping[str, str], console: Console, ready_timeout_s: float
) -> int:
    """Start a supervisor in a session of its own and return when it serves; when it runs already, say so."""
    folder = state_dir(home, service_name(options, DEFAULT_NAME))
    hint = f"  baton chat{name_flag(folder.name, DEFAULT_NAME)}\n  baton down{name_flag(folder.name, DEFAULT_NAME)}\n"
    lines = Lines(console, hint=hint)
    if folder.is_running():
        console.print(f"baton: service {folder.name!r} is running already", markup=False, highlight=False)
        state = folder.read()
        if state is not None and state.phase is Phase.READY:
            lines.ready(state)
            return 0
        return _follow(folder, lines, None, ready_timeout_s)
    deployment(options)    # downloads, and most mistakes, happen here, where somebody sees them
    folder.logs.mkdir(parents=True, exist_ok=True)
    folder.forget()
    arguments = [*_arguments(options, folder.name), "--ready-timeout", str(ready_timeout_s)]
    with (folder.logs / "supervisor.log").open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, str(Path(sys.executable).parent / "baton"), "up", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment), start_new_session=True,
        )  # fmt: skip
    return _follow(folder, lines, supervisor, ready_timeout_s)


def _arguments(options: UpOptions, name: str) -> list[str]:
    """The command line that gives these options again."""
    arguments = [] if options.target is None else [options.target]
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "target"}
    for flag, value in {**given, "name": name}.items():
        if value is not None:
            arguments += [f"--{flag.replace('_', '-')}", str(value)]
    return arguments


def _follow(
    folder: StateDir, lines: Lines, supervisor: subprocess.Popen[bytes] | None, ready_timeout_s: float
) -> int:
    """Show the service until it is ready. Raises StartFailed when it will not be."""
    shown: ServiceState | None = None
    deadline_s = time.monotonic() + ready_timeout_s + _DOWN_TIMEOUT_S    # it stops by itself; this is for a stuck one
    while time.monotonic() < deadline_s:
        status = supervisor.poll() if supervisor else None if folder.is_running() else 1
        state = folder.read()
        if state is not None and state != shown and state.phase is not Phase.FAILED:
            lines.show(state)
            shown = state
        if state is not None and state.phase in (Phase.READY, Phase.DEGRADED):
            return 0
        if status is not None:
            failed = state is not None and state.phase is Phase.FAILED
            reason = state.note if state is not None and failed else last_line(folder.logs / "supervisor.log")
            raise StartFailed(reason, status=status or 1)
        time.sleep(_POLL_S)
    raise StartFailed(f"the supervisor does not answer; its log is {folder.logs / 'supervisor.log'}", status=1)


def _view(name: str, console: Console) -> View:
    if console.is_terminal:
        return Board(console, hint=f"baton chat{name_flag(name, DEFAULT_NAME)}\n")
    return Lines(console)


def down(folder: StateDir, console: Console) -> None:
    """Stop a service and wait until nothing of it is left. Raises ConfigError when it is not ours to stop."""
    state = folder.read()
    if state is None:
        raise ConfigError(f"service {folder.name!r} is just starting; try again in a moment")
    console.print(f"baton: stopping {folder.name}; open requests may finish", markup=False, highlight=False)
    _send(state.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + _DOWN_TIMEOUT_S
    while folder.is_running():
        if time.monotonic() > deadline_s:
            _send(state.pid, signal.SIGKILL)    # its processes die with it
            deadline_s = time.monotonic() + _DOWN_TIMEOUT_S
        time.sleep(_POLL_S)
    console.print(f"baton: {folder.name} is down", markup=False, highlight=False)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise ConfigError(f"process {pid} belongs to another user; stop it as that user") from None
