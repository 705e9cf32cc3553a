"""Writes which implementation the oracle chooses for each operation, shape class and kind of device, and why.

`--write` renews tests/kernels/chosen/<device>.txt after a change that was meant; a test compares. Asked is for every
shape that is compiled ahead for any device, so that a device's table shows what it refuses too. Triton is taken to be
one fixed version, whatever is installed.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton_kernels.capabilities import NAMED, Capabilities
from baton_kernels.families import FAMILIES
from baton_kernels.oracle import Unsupported, choices
from baton_kernels.registry import Family, Shape

TABLES = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "chosen"
TRITON = (3, 7)


def every_shape(family: Family[Any, Any]) -> list[Shape]:
    """Of any device, each once."""
    return list(dict.fromkeys(shape for device in NAMED.values() for shape in family.shapes(device)))


def table(capabilities: Capabilities) -> str:
    """A paragraph per operation and answer: what runs, why, and for which shape classes."""
    device = replace(capabilities, triton=None if capabilities.vendor == "cpu" else TRITON)
    paragraphs: list[str] = []
    for family in FAMILIES:
        labels: dict[str, dict[str, None]] = {}  # answer -> shape classes, in order
        for shape in every_shape(family):
            try:
                best = choices(family, device, shape)[0]
                answer = f"{best.op}: {best.implementation}{' (slow)' if best.slow else ''}: {best.reason}"
            except Unsupported as error:
                answer = f"{family.op}: REFUSED: {error}"
            labels.setdefault(answer, {})[shape.label] = None
        for answer, names in labels.items():
            lines = textwrap.fill(" ".join(names), 120, initial_indent="    ", subsequent_indent="    ",
                                  break_long_words=False, break_on_hyphens=False)  # fmt: skip
            paragraphs.append(f"{answer}\n{lines}\n")
    return "\n".join(paragraphs)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the tables; without it they are printed")
    if not parser.parse_args(arguments).write:
        print("\n".join(f"== {name}\n{table(device)}" for name, device in NAMED.items()))
        return 0
    TABLES.mkdir(exist_ok=True)
    for name, device in NAMED.items():
        (TABLES / f"{name}.txt").write_text(table(device))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
