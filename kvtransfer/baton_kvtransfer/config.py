"""Settings of one endpoint; resolved at the edge of the worker process, section `transfer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

SLOT_UNIT_BYTES = 4096
WireChoice = Literal["auto", "shm", "tcp", "nixl", "mooncake"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """Defaults work on one machine and on a cluster network."""

    listen: Annotated[str, Field(description="host:port where peers connect; port 0 picks one")] = "127.0.0.1:0"
    advertise: Annotated[
        str, Field(description="host that peers should dial, when it is not the one of `listen` (pod address)")
    ] = ""
    wire: Annotated[
        WireChoice,
        Field(description="auto = shm on one host, else nixl where both ends have RDMA, else tcp; a name insists"),
    ] = "auto"
    slot_bytes: Annotated[
        int,
        Field(
            ge=SLOT_UNIT_BYTES,
            le=64 << 20,
            multiple_of=SLOT_UNIT_BYTES,
            description="size of one landing slot, bytes; with less than 2 MiB, chunks cost more than their bytes",
        ),
    ] = 4 << 20
    slots_per_peer: Annotated[int, Field(ge=1, le=1024, description="landing slots, so chunks in flight, per peer")] = 4
    max_peers: Annotated[
        int, Field(ge=1, le=4096, description="senders served at once; bounds slot memory, further ones are refused")
    ] = 64
    connect_timeout_s: Annotated[float, Field(gt=0, description="connect and hello, seconds")] = 2.0
    alive_interval_s: Annotated[
        float, Field(gt=0, description="heartbeat period, seconds; a peer silent for three of them is gone")
    ] = 1.0
    answer_timeout_s: Annotated[
        float, Field(gt=0, description="longest wait for a living peer's grant, credit, commit or drained, seconds")
    ] = 5.0
