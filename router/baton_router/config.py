"""Settings of the router, section `router` (variables BATON_ROUTER_<FIELD>, flags --<field>).

Resolved once in `main`; every other file is handed the frozen record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from baton_common.errors import ConfigError


def _comma_list(value: object) -> object:
    """`a,b` from a flag or variable; a YAML list stays as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """What one router process needs to know. `model` is only read for its tokeniser, chat template and config.json."""

    model: Annotated[str, Field(description="Hugging Face checkpoint folder or hub name")] = ""
    served_name: Annotated[str, Field(description="model name clients ask for; default: the folder's name")] = ""
    listen: Annotated[str, Field(description="host:port of the HTTP endpoint")] = "127.0.0.1:8000"
    workers: Annotated[CommaList, Field(description="host:port of every worker, comma separated")] = ()
    worker_services: Annotated[
        CommaList, Field(description="in Kubernetes, instead of workers: Services whose pods are the workers")
    ] = ()
    kubeconfig: Annotated[str, Field(description="cluster of worker_services; default: the one this pod runs in")] = ""
    api_keys: Annotated[CommaList, Field(description="accepted bearer keys, comma separated; none = open")] = ()
    api_keys_folder: Annotated[
        str, Field(description="folder with one file of keys per tenant (a mounted Secret), read again when it changes")
    ] = ""
    request_timeout_s: Annotated[float, Field(gt=0, description="deadline of one request, seconds")] = 600.0
    worker_wait_s: Annotated[
        float, Field(ge=0, description="how long a request waits for a worker to appear before 503, seconds")
    ] = 2.0
    resume_wait_s: Annotated[
        float, Field(ge=0, description="how long a started answer waits for a lost worker to return, seconds")
    ] = 30.0
    local_below_tokens: Annotated[
        int, Field(ge=0, description="uncached prompt suffix below this is prefilled by decode itself, tokens")
    ] = 64
    max_inflight: Annotated[int, Field(ge=1, description="requests in flight before 429")] = 1024
    drain_s: Annotated[int, Field(ge=0, description="time for open answers to finish after SIGTERM, seconds")] = 25
    otlp_endpoint: Annotated[
        str, Field(description="OTLP/HTTP collector of spans, http://host:4318; empty = no spans")
    ] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least severe log line")] = (
        "info"
    )
    log_style: Annotated[Literal["text", "json"], Field(description="form of the log lines")] = "text"


def check_workers(config: RouterConfig) -> None:
    """Workers come from one source. Raises ConfigError that names the settings."""
    if config.workers and config.worker_services:
        raise ConfigError(
            "workers and worker_services are both set; give --workers host:port,… or --worker-services name,…",
            param="worker_services",
        )
    if not config.workers and not config.worker_services:
        raise ConfigError(
            "no workers: give --workers host:port,… or, in Kubernetes, --worker-services name,…", param="workers"
        )


def split_address(listen: str) -> tuple[str, int]:
    """`host:port` -> (host, port). Raises ConfigError naming the setting."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"router.listen must be host:port, got {listen!r}", param="listen")
    return host.strip("[]"), int(port)
