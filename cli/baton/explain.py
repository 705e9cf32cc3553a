"""`baton explain`: every setting of every component, its value, and where the value came from; and the wires here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton_common.errors import ConfigError
from baton_common.settings import resolve
from baton_engine.config import EngineConfig
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.wires.choice import WIRES, has_rdma, skipped
from baton_router.config import RouterConfig
from baton_worker.config import WorkerConfig

SECTIONS: Mapping[str, type[object]] = {
    "router": RouterConfig,
    "worker": WorkerConfig,
    "engine": EngineConfig,
    "transfer": TransferConfig,
}


def show(section: str | None, *, file: Path | None, environment: Mapping[str, str], console: Console) -> None:
    """Print one section or all. Raises ConfigError for an unknown section or a wrong setting."""
    if section is not None and section not in SECTIONS:
        raise ConfigError(f"no section {section!r}; there are {', '.join(SECTIONS)}", param="section")
    for name in SECTIONS if section is None else [section]:
        resolved = resolve(SECTIONS[name], section=name, file=file, environment=environment)
        table = Table(title=f"{name} (BATON_{name.upper()}_…)", title_justify="left", box=None, pad_edge=False)
        for heading in ("setting", "value", "from", "what it does"):
            table.add_column(heading, overflow="fold")
        for row in resolved.explain():
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table, "")
        if name == "transfer":
            _wires(console)


def _wires(console: Console) -> None:
    """What `wire: auto` can choose from on this machine."""
    rdma = has_rdma()
    table = Table(title="wires that auto offers here, preferred first", title_justify="left", box=None, pad_edge=False)
    for heading in ("wire", "offered"):
        table.add_column(heading, overflow="fold")
    for wire in WIRES:
        reason = skipped(wire, rdma=rdma).replace("[", "\\[")
        table.add_row(wire, f"no: {reason}" if reason else "yes")
    console.print(table, "")
