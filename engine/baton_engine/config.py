"""Settings of one engine. Resolved once at the edge of a process (`baton_common.settings`), frozen afterwards.

Every default works; zero means "choose for me" wherever a size could be derived from the model or the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine computes, and how much it takes on."""

    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="of weights and activations, auto = the checkpoint's, or float32 where bfloat16 is slow"),
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], Field(description="dtype of the KV cache, auto = that of the weights")
    ] = "auto"
    page_tokens: Annotated[int, Field(ge=16, le=128, description="tokens per KV page, may differ between workers")] = 64
    context_tokens: Annotated[
        int, Field(ge=0, le=1 << 24, description="longest prompt + output, 0 = what the model was made for")
    ] = 0
    max_rows: Annotated[int, Field(ge=1, le=4096, description="requests that compute at the same time")] = 64
    step_tokens: Annotated[
        int, Field(ge=1, le=1 << 17, description="query tokens per step: prefill chunks and decodes together")
    ] = 512
    pages: Annotated[int, Field(ge=0, description="KV pages, 0 = from kv_bytes or from the memory of the device")] = 0
    kv_bytes: Annotated[int, Field(ge=0, description="memory of the KV pool in bytes, 0 = choose")] = 0
    kv_memory_fraction: Annotated[
        float,
        Field(
            ge=0.0,
            le=0.95,
            description="most of the available memory that a chosen KV pool takes, 0 = 0.25 on a CPU, 0.85 on a GPU",
        ),
    ] = 0.0
    device_sharers: Annotated[
        int, Field(ge=1, le=64, description="workers on the same GPU: a chosen KV pool leaves the others their part")
    ] = 1
    max_queue: Annotated[int, Field(ge=1, description="requests that wait for admission; more are refused")] = 256
    max_reserved: Annotated[int, Field(ge=1, description="requests that hold pages and wait for their KV")] = 64
    threads: Annotated[int, Field(ge=0, le=1024, description="compute threads on a CPU, 0 = all cores")] = 0
    kernels: Annotated[
        str, Field(description="kernels to use instead of the chosen ones: operation=implementation, by commas")
    ] = ""
    layer_group: Annotated[int, Field(ge=1, description="layers whose KV is handed over together")] = 4
    invariant_every: Annotated[int, Field(ge=1, description="steps between two checks of the page accounting")] = 256
