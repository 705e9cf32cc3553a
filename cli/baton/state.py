"""What one supervised service leaves on disk: a lock, a state file, logs, KV pages if it keeps any.

Invariants: the supervisor holds the lock for as long as it lives and nobody else ever does, so "is it running?" cannot
be answered wrongly by a stale file. The state file is replaced whole, so a reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from baton_common.errors import BatonError, ConfigError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LOCK_TRIES = 20


class Phase(StrEnum):
    STARTING = "starting"    # has never been ready
    READY = "ready"
    DEGRADED = "degraded"    # was ready, is not now; `note` says why
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"        # gave up; `note` says why


class Life(StrEnum):
    WAITING = "waiting"      # not started yet
    RUNNING = "running"
    RESTARTING = "restarting"    # crashed, will be started again after a pause
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    name: str
    role: str
    address: str            # where it listens
    log: str                # path
    life: Life = Life.WAITING
    pid: int = 0            # of the running process, else 0
    restarts: int = 0
    last_exit: str = ""     # how it ended the last time


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    name: str
    phase: Phase
    note: str               # why the phase is what it is, one line
    url: str
    model: str              # name that API requests use
    pid: int                # of the supervisor
    started_s: float        # wall clock
    processes: tuple[ProcessState, ...]


class AlreadyRunning(BatonError):
    """A supervisor of this name lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDir:
    """The folder of one service. `name` was checked by `state_dir`."""

    name: str
    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def pages(self) -> Path:
        """KV on disk, a folder for each worker; it is found again when the service starts anew."""
        return self.path / "kv"

    @property
    def _file(self) -> Path:
        return self.path / "state.json"

    @property
    def _lock_file(self) -> Path:
        return self.path / "lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Raises AlreadyRunning when another process does."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("ab") as handle:
            for _ in range(_LOCK_TRIES):  # a reader in `is_running` may hold it for an instant
                if _try_lock(handle, fcntl.LOCK_EX):
                    break
                time.sleep(0.01)
            else:
                raise AlreadyRunning(f"service {self.name!r} is running already; `baton down --name {self.name}` first")
            yield

    def is_running(self) -> bool:
        """True while a supervisor holds the lock."""
        if not self._lock_file.exists():
            return False
        with self._lock_file.open("ab") as handle:
            return not _try_lock(handle, fcntl.LOCK_SH)

    def write(self, state: ServiceState) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(_STATE.dump_json(state, indent=1))
        os.replace(fresh, self._file)

    def read(self) -> ServiceState | None:
        """The last state written; None when there is none that we understand."""
        try:
            return _STATE.validate_json(self._file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def forget(self) -> None:
        """Drop the state of an earlier run, so that nobody mistakes it for this one's."""
        self._file.unlink(missing_ok=True)


_STATE = TypeAdapter(ServiceState)


def _try_lock(handle: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def state_home(environment: Mapping[str, str]) -> Path:
    """Folder of all services: $XDG_STATE_HOME/baton or ~/.local/state/baton."""
    base = environment.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "baton"


def state_dir(home: Path, name: str) -> StateDir:
    """Raises ConfigError when `name` could not be a name of a service."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: use up to 63 of a-z, 0-9 and -, like my-model", param="name")
    return StateDir(name=name, path=home / name)


def running(home: Path) -> list[StateDir]:
    """Services that run now, by name."""
    if not home.is_dir():
        return []
    known = [StateDir(name=path.name, path=path) for path in sorted(home.iterdir()) if _NAME.fullmatch(path.name)]
    return [service for service in known if service.is_running()]


def find_running(home: Path, name: str | None) -> StateDir | None:
    """The service called `name`; without a name the default one, or the only one. None when it does not run.

    Raises ConfigError when several run, none of them is the default and no name says which is meant.
    """
    services = {service.name: service for service in running(home)}
    if name is not None:
        return services.get(state_dir(home, name).name)
    if len(services) > 1 and DEFAULT_NAME not in services:
        raise ConfigError(f"several services run ({', '.join(services)}); say which one with --name", param="name")
    return services.get(DEFAULT_NAME) or next(iter(services.values()), None)


DEFAULT_NAME = "default"
