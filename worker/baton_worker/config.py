"""Settings of the process shell. Engine and transfer have sections of their own on the same command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from baton_common.errors import ConfigError
from baton_worker.tiering import parse_tiers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Section `worker`."""

    model: Annotated[
        str, Field(description="checkpoint: a folder in Hugging Face layout, or a hub name owner/name")
    ] = ""
    model_name: Annotated[str, Field(description="name told to routers; empty = the model's last path part")] = ""
    role: Annotated[
        Literal["", "prefill", "decode", "colocated"],
        Field(description="empty = the program's own; baton-decode may also be colocated: it prefills for itself"),
    ] = ""
    listen: Annotated[str, Field(description="host:port of the gRPC server for routers; port 0 = any free one")] = (
        "127.0.0.1:9001"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="Prometheus port on the same host; 0 = off")] = 0
    worker_id: Annotated[str, Field(description="stable name of this worker; empty = its host:port")] = ""
    device: Annotated[str, Field(description="where the model runs: cpu, cuda, cuda:1")] = "cpu"
    tiers: Annotated[
        str,
        Field(
            description="where KV is kept below the device, with sizes; empty = nowhere: "
            "host=8GiB,file=/var/kv:64GiB,mooncake=master:50051:4GiB,sessions=2GiB (per tenant)"
        ),
    ] = ""
    drain_s: Annotated[float, Field(ge=0, description="on SIGTERM: seconds that running requests get to finish")] = 30.0
    stall_s: Annotated[float, Field(gt=0, description="work but no step for so many seconds = not healthy")] = 20.0
    stream_backlog: Annotated[
        int, Field(ge=16, description="messages kept for a router that does not read; more closes its stream")
    ] = 4096
    stream_stall_s: Annotated[
        float, Field(gt=0, description="a router that takes no message for so many seconds loses its stream")
    ] = 30.0
    dump_dir: Annotated[str, Field(description="folder of crash dumps; empty = the working folder")] = ""
    otlp_endpoint: Annotated[
        str, Field(description="OTLP/HTTP collector of spans, http://host:4318; empty = no spans")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least severe log records to write")
    ] = "info"
    log_style: Annotated[Literal["text", "json"], Field(description="readable lines or one JSON object each")] = "text"

    def __post_init__(self) -> None:
        split_address(self.listen, "listen")
        parse_tiers(self.tiers)


def split_address(address: str, name: str) -> tuple[str, int]:
    """(host, port) of "host:port". Raises ConfigError that names the setting."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--{name} {address!r} is no address; write host:port, like 127.0.0.1:9001", param=name)
    return host.strip("[]"), int(port)
