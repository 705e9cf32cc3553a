"""`baton explain kernels`: which kernel would run for each operation of a model on a device, and why.

The device need not be here: its capabilities come from a table, and nothing is compiled or loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from baton_common.checkpoint import demo_checkpoint, resolve_checkpoint
from baton_common.settings import resolve
from baton_engine.config import EngineConfig
from baton_engine.models.kernels import decoder_shapes, parse_force
from baton_engine.models.loader import read_format
from baton_kernels import oracle
from baton_kernels.capabilities import Capabilities, named, of_device
from baton_worker.config import WorkerConfig


def show_kernels(
    device: str | None, model: str | None, *, file: Path | None, environment: Mapping[str, str], console: Console
) -> None:
    """Print one row per operation and shape class. ConfigError for a device or model that does not exist, or that does
    not fit the other."""
    engine = resolve(EngineConfig, section="engine", file=file, environment=environment).value
    worker = resolve(WorkerConfig, section="worker", file=file, environment=environment).value
    capabilities = _capabilities(device or worker.device)
    folder = resolve_checkpoint(model or worker.model) if model or worker.model else demo_checkpoint()
    form = read_format(folder, dtype=engine.dtype, kv_dtype=engine.kv_dtype, native_bf16=capabilities.native_bf16)
    table = Table(
        title=f"{folder.name} on {capabilities.name}: {form.dtype}, KV {form.kv_dtype}, pages of {engine.page_tokens}",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for heading in ("operation", "shape", "runs", "why"):
        table.add_column(heading, overflow="fold")
    layout = form.spec.layout(engine.page_tokens, form.kv_dtype)
    for family, shape in decoder_shapes(form.spec, form.torch_dtype, layout):
        best = oracle.choices(family, capabilities, shape, parse_force(engine.kernels))[0]
        config = " ".join(f"{name}={value}" for name, value in best.config.items())
        reason = f"{best.reason} ({config})" if config else best.reason
        table.add_row(best.op, best.label, best.implementation + " (slow path)" * best.slow, reason)
    console.print(table)


def _capabilities(device: str) -> Capabilities:
    """Of an architecture by name, or of a device that is here."""
    if device == "cuda" or device.startswith("cuda:"):
        return of_device(torch.device(device))
    return named(device)
