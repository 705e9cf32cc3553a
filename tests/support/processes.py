"""Real workers and routers as processes, for tests. Whatever is started is killed when its `with` block ends.

Ports are chosen by the system and read from the log, so that tests can run side by side.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

READY_S = 100.0
MODULES = {"prefill": "baton_prefill", "decode": "baton_decode", "colocated": "baton_decode", "router": "baton_router"}


class ProcessFailed(AssertionError):
    """A process ended or stayed silent when it should not; carries the end of its log."""


class ServiceProcess:
    """One child process and its log file. Settings become flags: `drain_s=3` is `--drain-s 3`."""

    def __init__(
        self, role: str, folder: Path, *, name: str, settings: Mapping[str, Any], code: str | None = None
    ) -> None:
        """`code` is run in place of the role's module: a program that breaks something first."""
        self.role = role
        self.name = name
        self.log_path = folder / f"{name}.log"
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        program = ["-m", MODULES[role]] if code is None else ["-c", code]
        self._argv = [sys.executable, *program, *flags]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    # ---- life -------------------------------------------------------------------------------------------------------
    def start(self) -> Self:
        """Start it; returns at once. May be called again after the process ended: a restart with the same flags."""
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, env=environment
            )
        return self

    def wait_ready(self, timeout_s: float = READY_S) -> Self:
        """Until the process says in its log that it serves."""
        deadline_s = time.monotonic() + timeout_s
        while self._ready_address() is None:
            if self.exit_code is not None:
                raise ProcessFailed(f"{self.name} ended with {self.exit_code} before it was ready:\n{self.log()}")
            if time.monotonic() > deadline_s:
                raise ProcessFailed(f"{self.name} was not ready after {timeout_s} s:\n{self.log()}")
            time.sleep(0.05)
        return self

    def close(self) -> None:
        """Kill it, also when it is stopped, and wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # also ends a process that SIGSTOP holds
            self._process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what tests do to it ----------------------------------------------------------------------------------------
    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9"""
        self.signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Exit status; negative = ended by that signal."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end within {timeout_s} s:\n{self.log()}") from None

    # ---- what it says -----------------------------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def address(self) -> str:
        """host:port where it serves (gRPC of a worker, HTTP of a router); known once it is ready."""
        address = self._ready_address()
        assert address is not None, f"{self.name} is not ready"
        return address

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def records(self) -> list[dict[str, Any]]:
        """Its log records, as far as they are JSON."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]

    def _ready_address(self) -> str | None:
        raise NotImplementedError


class WorkerProcess(ServiceProcess):
    """`role`: prefill, decode or colocated. Small and exact by default: float32, 16-token pages, one thread."""

    def __init__(
        self,
        role: str,
        checkpoint: Path,
        folder: Path,
        *,
        name: str = "",
        code: str | None = None,
        **settings: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "model": checkpoint, "role": role, "listen": "127.0.0.1:0", "dtype": "float32", "page_tokens": 16,
            "pages": 256, "threads": 1, "log_style": "json", "log_level": "debug", "dump_dir": folder, "drain_s": 5,
        }  # fmt: skip
        super().__init__(role, folder, name=name or role, settings=defaults | settings, code=code)

    def _ready_address(self) -> str | None:
        return next((record["address"] for record in self.records() if record["message"] == "ready"), None)


class RouterProcess(ServiceProcess):
    """A router in front of the given workers (host:port each)."""

    def __init__(
        self, checkpoint: Path, folder: Path, *, workers: Sequence[str], name: str = "router", **settings: Any
    ) -> None:
        defaults = {
            "model": checkpoint, "listen": "127.0.0.1:0", "workers": ",".join(workers), "log_style": "json",
        }  # fmt: skip
        super().__init__("router", folder, name=name, settings=defaults | settings)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def wait_workers(self, count: int, timeout_s: float = READY_S) -> Self:
        """Until it has live links to so many workers; a router serves before it has any."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            workers = httpx.get(f"{self.url}/ready", timeout=10).json()["workers"]
            if sum(worker["state"] == "up" for worker in workers) >= count:
                return self
            if time.monotonic() > deadline_s:
                what = f"{self.name} has not {count} workers after {timeout_s} s"
                raise ProcessFailed(f"{what}: {workers}\n{self.log()}")
            time.sleep(0.05)

    def _ready_address(self) -> str | None:
        for record in self.records():
            if found := re.search(r"on http://(\S+)", record["message"]):
                return found[1]
        return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, below the range of outgoing connections, so that nobody takes them meanwhile."""
    found: list[int] = []
    for port in random.sample(range(21000, 32000), 200):
        with socket.socket() as probe:
            if len(found) < count and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """All processes of one service, ready to serve. No router when none was asked for."""

    prefill: tuple[WorkerProcess, ...]
    decode: tuple[WorkerProcess, ...]
    colocated: tuple[WorkerProcess, ...]
    router: RouterProcess | None

    @property
    def workers(self) -> tuple[WorkerProcess, ...]:
        return self.prefill + self.decode + self.colocated


@contextmanager
def spawn_service(
    folder: Path,
    checkpoint: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    colocated: int = 0,
    router: bool = True,
    router_settings: Mapping[str, Any] | None = None,
    fixed_ports: bool = False,
    **worker_settings: Any,
) -> Iterator[Service]:
    """Start the processes side by side and wait until all serve; `worker_settings` go to every worker.

    With `fixed_ports` each keeps its address when it is started again, as under a supervisor.
    """
    ports = iter(free_ports(prefill + decode + colocated + 1) if fixed_ports else ())

    def listen() -> str:
        return f"127.0.0.1:{next(ports, 0)}"

    with ExitStack() as stack:

        def start(role: str, count: int) -> tuple[WorkerProcess, ...]:
            names = [f"{role}-{index}" for index in range(count)]
            workers = [
                WorkerProcess(role, checkpoint, folder, name=name, **{"listen": listen(), **worker_settings})
                for name in names
            ]
            return tuple(stack.enter_context(worker) for worker in workers)

        groups = {"prefill": start("prefill", prefill), "decode": start("decode", decode)}
        groups["colocated"] = start("colocated", colocated)
        workers = [worker.wait_ready() for group in groups.values() for worker in group]
        front = None
        if router:
            addresses = [worker.address for worker in workers]
            settings = {"listen": listen(), **(router_settings or {})}
            process = RouterProcess(checkpoint, folder, workers=addresses, **settings)
            front = stack.enter_context(process).wait_ready().wait_workers(len(workers))
        yield Service(**groups, router=front)
