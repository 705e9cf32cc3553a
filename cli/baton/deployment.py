"""From what a user asked for to the command lines of one router and its workers. Pure: starts and looks at nothing.

Every worker gets a port of its own that stays the same over restarts, so that the router finds it again. Workers listen
on the loopback interface only; of all processes just the router can be reached from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.supervisor import Command
from baton_common.errors import ConfigError
from baton_operator.plan.blueprint import Tiers
from baton_operator.plan.commands import tiers_text

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8000
_ROUTER_WAVE, _WORKER_WAVE = 0, 1
_FIRST_WORKER_PORT = 20000    # below the range of outgoing connections
_PORTS_PER_SERVICE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One service on this machine. None = the component's own default."""

    model: str                  # folder of a checkpoint
    served_name: str
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    context_tokens: int | None = None
    wire: str | None = None
    tiers: Tiers | None = None    # of each worker; a StorageClass says nothing here
    collector: str | None = None  # of spans, a URL
    config: Path | None = None    # YAML with sections of settings, handed to every process

    def __post_init__(self) -> None:
        if (self.prefill == 0) != (self.decode == 0):
            raise ConfigError(
                f"{self.prefill} prefill and {self.decode} decode workers cannot serve; have one of each, "
                "or --colocated workers"
            )
        if self.workers == 0:
            raise ConfigError("no workers: use --prefill and --decode, or --colocated")

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.colocated

    @property
    def url(self) -> str:
        """Where a client on this machine finds the router."""
        host = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"

    @property
    def first_worker_port(self) -> int:
        """Where to look for ports of workers. Differs between services, so that two starting at once do not collide."""
        return _FIRST_WORKER_PORT + self.port % 1000 * _PORTS_PER_SERVICE

    def commands(
        self, *, worker_ports: Sequence[int], scripts: Path, logs: Path, pages: Path, cores: int,
        environment: Mapping[str, str],
    ) -> tuple[Command, ...]:  # fmt: skip
        """`scripts` is the folder of the installed programs, `pages` that of KV on disk; `environment` what the
        processes inherit.
        """
        threads = max(1, cores // self.workers)
        limited = {**environment, "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(threads))}
        addresses = [f"{LOOPBACK}:{port}" for port in worker_ports]
        workers = [
            Command(
                name=name, role=role,
                argv=(str(scripts / program), *self._worker_flags(role, name, address, logs, pages, threads)),
                environment=limited, address=address, log=logs / f"{name}.log", wave=_WORKER_WAVE,
            )
            for (name, role, program), address in zip(self._worker_names(), addresses, strict=True)
        ]  # fmt: skip
        listen = f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
        flags = ["--model", self.model, "--served-name", self.served_name, "--listen", listen]
        if self.collector is not None:
            flags += ["--otlp-endpoint", self.collector]
        router = Command(
            name="router", role="router",
            argv=(str(scripts / "baton-router"), *flags, "--workers", ",".join(addresses), *self._config_flag()),
            environment=environment, address=listen, log=logs / "router.log", wave=_ROUTER_WAVE,
        )  # fmt: skip
        return (router, *workers)

    def _worker_names(self) -> Iterator[tuple[str, str, str]]:
        """(name, role, program) of each worker."""
        kinds = (
            ("prefill", self.prefill, "baton-prefill"),
            ("decode", self.decode, "baton-decode"),
            ("colocated", self.colocated, "baton-decode"),
        )
        for role, count, program in kinds:
            for index in range(count):
                yield f"{role}-{index}", role, program

    def _worker_flags(
        self, role: str, name: str, address: str, logs: Path, pages: Path, threads: int
    ) -> tuple[str, ...]:
        flags: dict[str, str | None] = {
            "model": self.model,
            "model-name": self.served_name,
            "role": role,
            "listen": address,
            "worker-id": name,
            "device": self.device,
            "device-sharers": None if self.device in (None, "cpu") else str(self.workers),
            "dtype": self.dtype,
            "kv-dtype": self.kv_dtype,
            "context-tokens": None if self.context_tokens is None else str(self.context_tokens),
            "threads": str(threads),
            "wire": self.wire,
            "tiers": None if self.tiers is None else tiers_text(self.tiers, str(pages / name)),
            "otlp-endpoint": self.collector,
            "dump-dir": str(logs),
        }
        given = ((f"--{flag}", value) for flag, value in flags.items() if value is not None)
        return (*(part for pair in given for part in pair), *self._config_flag())

    def _config_flag(self) -> tuple[str, ...]:
        return () if self.config is None else ("--config", str(self.config))
