"""Writes swept rows into a configuration table, one line per table and row so that a change can be read.

A row that was swept carries its own provenance in the table's `swept`; the others keep the table's `how`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.program import Config


def write_rows(folder: Path, op: str, capabilities: Capabilities, rows: Mapping[str, Config], provenance: str) -> None:
    """Put `rows` (label -> configuration) into the table of this architecture family and Triton version.

    Without such a table one is begun from the nearest version of the family.
    """
    path = folder / f"{op}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    tables: list[dict[str, Any]] = document["tables"]
    assert capabilities.triton is not None, "nothing is swept without Triton"
    version = ".".join(map(str, capabilities.triton))
    own = [table for table in tables if table["family"] == capabilities.family]
    table = next((table for table in own if table["triton"] == version), None)
    if table is None:
        near = min(own or tables, key=lambda table: abs(_minor(table["triton"]) - _minor(version)))
        table = {
            "family": capabilities.family,
            "triton": version,
            "how": near["how"],
            "rows": dict(near["rows"]),
            "swept": dict(near.get("swept", {})),
        }
        tables.append(table)
    for label, config in rows.items():
        table["rows"][label] = dict(config)
        table["swept"] = table.get("swept", {}) | {label: provenance}
    path.write_text(_text(document))


def _minor(version: str) -> int:
    return int(version.split(".")[1])


def _text(document: Mapping[str, Any]) -> str:
    """As a person would lay it out: a table on one line while it has a single row, else a line for each row."""
    tables = ",\n".join(f"    {_table(table)}" for table in document["tables"])
    return f'{{\n  "op": {json.dumps(document["op"])},\n  "tables": [\n{tables}\n  ]\n}}\n'


def _table(table: Mapping[str, Any]) -> str:
    if len(table["rows"]) == 1 and not table.get("swept"):
        return json.dumps(table)
    head = ", ".join(f"{json.dumps(name)}: {json.dumps(table[name])}" for name in ("family", "triton", "how"))
    parts = [head]
    for name in ("rows", "swept"):
        if table.get(name):
            lines = ",\n".join(f"      {json.dumps(label)}: {json.dumps(row)}" for label, row in table[name].items())
            parts.append(f"{json.dumps(name)}: {{\n{lines}\n    }}")
    return "{" + ", ".join(parts) + "}"
