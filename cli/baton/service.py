"""One supervised service from start to end: lock, ports, processes, readiness, state file.

The way it goes: STARTING -> READY <-> DEGRADED -> STOPPING -> STOPPED; or FAILED, when a process cannot be kept running
or the service is not ready in time. Every change is written to the state file (for `baton status`, and for whoever
waits for a detached service) and shown to the view. Signals reach `stop` from the caller; this file installs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from baton.deployment import LOOPBACK, Deployment
from baton.ports import can_listen, free_ports
from baton.readiness import Readiness, ask
from baton.state import Phase, ServiceState, StateDir
from baton.supervisor import Command, GaveUp, Policy, Supervisor
from baton_common.clock import Clock
from baton_common.errors import ConfigError

_ASK_TIMEOUT_S = 2.0
_ASK_EVERY_S = {Phase.STARTING: 0.2, Phase.DEGRADED: 0.5, Phase.READY: 2.0}
_LOGS_KEPT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What of this machine the processes get."""

    scripts: Path                     # folder of the installed programs
    cores: int
    environment: Mapping[str, str]


class Service:
    """Use once: `await run()` while holding the lock of `folder`; `stop()` from the same loop ends it."""

    def __init__(
        self,
        *,
        folder: StateDir,
        model: str,
        url: str,
        commands: tuple[Command, ...],
        policy: Policy,
        clock: Clock,
        pid: int,
        started_s: float,
        view: Callable[[ServiceState], None],
        ready_timeout_s: float,
        is_ready: Callable[[str, float], Readiness] = ask,
    ) -> None:
        self._folder = folder
        self._url = url
        self._clock = clock
        self._view = view
        self._ready_timeout_s = ready_timeout_s
        self._is_ready = is_ready
        self._supervisor = Supervisor(commands, policy, clock, self._processes_changed)
        self._state = ServiceState(
            name=folder.name, phase=Phase.STARTING, note="", url=url, model=model, pid=pid, started_s=started_s,
            processes=self._supervisor.states,
        )  # fmt: skip

    def stop(self, *, now: bool = False) -> None:
        """End the service; `now` skips the time that running requests get."""
        self._enter(Phase.STOPPING, "open requests may finish" if not now else "")
        self._supervisor.stop(now=now)

    async def run(self) -> int:
        """Exit status: 0 after `stop`, else that of the failure. No process is left when it returns."""
        self._publish()
        watch = asyncio.create_task(self._watch())
        keep = asyncio.create_task(self._supervisor.run())
        failure: GaveUp | None = None
        try:
            await asyncio.wait([watch, keep], return_when=asyncio.FIRST_COMPLETED)
            if not keep.done():    # the watch ended first: not ready in time
                self._supervisor.stop()
            await keep
            if watch.done():
                failure = watch.result()
        except GaveUp as error:
            failure = error
        finally:
            self._supervisor.stop()
            watch.cancel()
        self._enter(Phase.STOPPED if failure is None else Phase.FAILED, "" if failure is None else failure.message)
        return 0 if failure is None else failure.status

    async def _watch(self) -> GaveUp:
        """Follows readiness for ever; returns only the failure to become ready in time."""
        deadline_s = self._clock.now() + self._ready_timeout_s
        while True:
            answer = self._named(await asyncio.to_thread(self._is_ready, self._url, _ASK_TIMEOUT_S))
            phase = self._state.phase
            if phase in _ASK_EVERY_S:
                if answer.ready:
                    self._enter(Phase.READY, "")
                else:
                    self._enter(Phase.STARTING if phase is Phase.STARTING else Phase.DEGRADED, answer.reason)
                if self._state.phase is Phase.STARTING and self._clock.now() > deadline_s:
                    waited = f"not ready after {self._ready_timeout_s:.0f} s"
                    return GaveUp(f"{waited}: {answer.reason}; logs are in {self._folder.logs}", status=1)
            await asyncio.sleep(_ASK_EVERY_S.get(phase, 1.0))

    def _named(self, answer: Readiness) -> Readiness:
        """The router knows workers by address; a person knows them by name."""
        reason = answer.reason
        for process in self._supervisor.states:
            reason = reason.replace(f"worker {process.address}", process.name)
        return replace(answer, reason=reason)

    def _processes_changed(self) -> None:
        self._state = replace(self._state, processes=self._supervisor.states)
        self._publish()

    def _enter(self, phase: Phase, note: str) -> None:
        if (phase, note) != (self._state.phase, self._state.note):
            self._state = replace(self._state, phase=phase, note=note)
            self._publish()

    def _publish(self) -> None:
        self._folder.write(self._state)
        self._view(self._state)


def prepare(deployment: Deployment, folder: StateDir, machine: Machine) -> tuple[Command, ...]:
    """Command lines of all processes, with ports that are free now; old logs are put aside.

    Raises ConfigError when the router's port is taken, before anything has been started.
    """
    if not can_listen(deployment.host, deployment.port):
        raise ConfigError(
            f"port {deployment.port} on {deployment.host} is in use; choose another with --port", param="port"
        )
    programs = ("baton-router", "baton-prefill", "baton-decode")
    if missing := [name for name in programs if not (machine.scripts / name).exists()]:
        raise ConfigError(f"{', '.join(missing)} not found in {machine.scripts}; install baton[all]")
    commands = deployment.commands(
        worker_ports=free_ports(deployment.workers, host=LOOPBACK, first=deployment.first_worker_port),
        scripts=machine.scripts, logs=folder.logs, pages=folder.pages, cores=machine.cores,
        environment=machine.environment,
    )  # fmt: skip
    for command in commands:
        if command.log.exists() and command.log.stat().st_size > _LOGS_KEPT_BYTES:
            command.log.replace(command.log.with_suffix(".log.1"))
    return commands
