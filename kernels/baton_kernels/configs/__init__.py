"""Offline configuration tables: one JSON file per operation, a table per architecture family and Triton version.

A table says how its rows were found: compiled (no spills, fits, never timed). A row that was the fastest of a sweep
says so itself, in the table's `swept`, with device, date and versions. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.program import Config

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration, and in words where it was found."""

    config: Config
    source: str


@cache
def _tables(op: str) -> list[Mapping[str, Any]]:
    file = resources.files(__name__) / f"{op}.json"
    tables: list[Mapping[str, Any]] = json.loads(file.read_text())["tables"] if file.is_file() else []
    return tables


def find(op: str, capabilities: Capabilities, label: str) -> Row:
    """The row of this shape class, else of `default`; from the table of this architecture family and the nearest Triton
    version, else from the first table. An operation without tables gets an empty configuration."""
    tables = _tables(op)
    if not tables:
        return Row(config={}, source="nothing to configure")
    own = [table for table in tables if table["family"] == capabilities.family]
    distance = lambda table: abs(_minor(table["triton"]) - (capabilities.triton or (3, 0))[1])  # noqa: E731
    table = min(own, key=distance) if own else tables[0]
    name = label if label in table["rows"] else DEFAULT
    how = table.get("swept", {}).get(name, table["how"])
    source = f"{table['family']}, Triton {table['triton']}, row {name}: {how}"
    if not own:
        source = f"no table for {capabilities.family}; borrowed from {source}"
    return Row(config=table["rows"][name], source=source)


def _minor(version: str) -> int:
    return int(version.split(".")[1])
