"""Compiles every kernel that ships for every kind of device, on each supported Triton, and reads what came out.

`tools/compile_kernels.py` compares with the committed tables (tests/kernels/compiled/<Triton>.json) and fails with a
list of what is wrong; `--write` writes the tables anew; `--op` is for some operations and their rows. A row is one
program of one shape on one target. Wrong is: it does not compile, it spills or uses a stack, it lacks an instruction
that its family expects (all three unless a reason stands in reasons.json beside the tables, written by hand), it got
worse than its row, or it has no row.
No device is needed. Each Triton runs in a process of its own; those of tools/tritons are installed by tools/tritons.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from baton_kernels.capabilities import named
from baton_kernels.families import FAMILIES
from baton_kernels.oracle import choices
from baton_kernels.rt.aot import Resources, missing, prized, resources
from baton_kernels.rt.language import TRITON_VERSION
from baton_kernels.rt.program import CompileFailed, Program

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tests" / "kernels" / "compiled"
REASONS = TABLES / "reasons.json"  # pattern of "<Triton> <row's name>" -> why it may be beyond the limits
INSTALLED = "installed"
TARGETS = ("sm_90", "sm_100", "gfx942", "gfx950")
PROCESSES = 2
REGISTERS_MORE = 8  # the register allocator's own noise between builds of a kernel

Table = Mapping[str, Mapping[str, Any]]  # row's name -> its numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All programs of one shape on one target."""

    target: str
    op: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One program, compiled."""

    name: str
    resources: Resources | None = None
    missing: tuple[str, ...] = ()  # kinds of instruction that its family expects
    failure: str = ""  # instead of resources


# ---- compiling ------------------------------------------------------------------------------------------------------
def tasks(ops: Sequence[str]) -> list[Task]:
    """Of some operations; none named: of all."""
    return [
        Task(target=target, op=family.op, index=index)
        for target in TARGETS
        for family in FAMILIES
        if not ops or family.op in ops
        for index in range(len(family.shapes(named(target))))
    ]


def compile_shape(task: Task) -> list[Row]:
    """What the oracle chooses for this shape on the target, with the configuration that it chooses."""
    capabilities = named(task.target)
    family = next(one for one in FAMILIES if one.op == task.op)
    shape = family.shapes(capabilities)[task.index]
    name = f"{task.target} {task.op} {shape.label}"
    try:
        choice = choices(family, capabilities, shape)[0]
        chosen = next(one for one in family.implementations if one.name == choice.implementation)
        programs: Sequence[Program] = chosen.bind(capabilities, shape, choice.config).programs
    except Exception as error:  # a family that is wrong must not hide what is wrong with the others
        return [Row(name=name, failure=f"cannot be bound: {type(error).__name__}: {error}")]
    if not programs:
        return [Row(name=name, failure=f"nothing to compile, {chosen.name} was chosen: {choice.reason}")]
    return [compile_program(f"{name} {one.name}", one, family.expected(one)) for one in programs]


def compile_program(name: str, program: Program, expected: Sequence[str]) -> Row:
    try:
        found = resources(program)
    except CompileFailed as error:
        return Row(name=name, failure=str(error))
    return Row(name=name, resources=found, missing=missing(expected, program.capabilities, found.code))


def numbered(rows: Iterable[Row]) -> dict[str, Row]:
    """By name; programs that share one get a number behind it."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        seen[row.name] += 1
        found[row.name if seen[row.name] == 1 else f"{row.name} #{seen[row.name]}"] = row
    return found


def compile_all(version: str, ops: Sequence[str]) -> dict[str, Row]:
    """In some processes; says when a target is done."""
    todo, rows = tasks(ops), list[Row]()
    # A fork would inherit the threads of torch.
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for task, after, found in zip(todo, [*todo[1:], None], pool.map(compile_shape, todo), strict=True):
            rows += found
            if after is None or after.target != task.target:
                print(f"kernels: Triton {version}: {task.target} compiled", flush=True)
    return numbered(rows)


# ---- judging --------------------------------------------------------------------------------------------------------
def problems(rows: Mapping[str, Row], table: Table | None, excused: Callable[[str], bool]) -> list[str]:
    """Everything that is wrong, a line each. `table` None: there is none for this Triton, only the limits hold."""
    found = []
    for name, row in sorted(rows.items()):
        wrong = [] if excused(name) else beyond_limits(row)
        if table is not None:
            wrong += [one for one in worse(row, table.get(name)) if one not in wrong]
        found += [f"{name}: {one}" for one in wrong]
    found += [f"{name}: nothing is compiled for this row any more" for name in sorted(set(table or ()) - set(rows))]
    return found


def beyond_limits(row: Row) -> list[str]:
    if row.resources is None:
        return [row.failure]
    found = [f"lacks a {kind} instruction" for kind in row.missing]
    return found + [f"{count} {unit}" for unit, count in row.resources.beyond_limits.items()]


def worse(row: Row, old: Mapping[str, Any] | None) -> list[str]:
    """Than the committed row."""
    if old is None:
        return ["has no row in the table"]
    if "failed" in old:
        return []
    if row.resources is None:
        return [row.failure]
    new = asdict(row.resources)
    grown = [
        f"{new[name]} {name}, was {old[name]}"
        for name in ("registers", "spills", "scalar_spills", "stack", "shared")
        if new[name] > old[name] + REGISTERS_MORE * (name == "registers")
    ]
    return grown + [f"lost its {kind}" for kind in old["code"] if prized(kind) and kind not in new["code"]]


# ---- tables ---------------------------------------------------------------------------------------------------------
def read(path: Path) -> Table | None:
    if not path.is_file():
        return None
    rows: Table = json.loads(path.read_text())["rows"]
    return rows


def excuses(version: str, reasons: Mapping[str, str]) -> Callable[[str], bool]:
    """Of a row's name: whether there is a reason for it to be beyond the limits."""
    return lambda name: any(fnmatchcase(f"{version} {name}", pattern) for pattern in reasons)


def of(ops: Sequence[str], table: Table | None) -> Table | None:
    """The rows of some operations; none named: all."""
    if table is None or not ops:
        return table
    return {name: row for name, row in table.items() if name.split()[1] in ops}


def as_table(rows: Mapping[str, Row]) -> Table:
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        found[name] = {"failed": row.failure} if row.resources is None else asdict(row.resources)
        if row.missing:
            found[name]["lacks"] = row.missing
    return found


def rendered(table: Table) -> str:
    """As text, a line for each row."""
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items())]
    return '{"rows": {\n' + ",\n".join(lines) + "\n}}\n"


def here(ops: Sequence[str], *, write: bool) -> int:
    """The check, or the writing, with the Triton of this process. Returns the exit status."""
    assert TRITON_VERSION is not None, "Triton is not installed"
    version = ".".join(map(str, TRITON_VERSION))
    path, began = TABLES / f"{version}.json", time.monotonic()
    rows = compile_all(version, ops)
    if write:
        table = read(path) or {}
        others = {name: row for name, row in table.items() if name not in (of(ops, table) or {})}
        path.write_text(rendered({**others, **as_table(rows)}))
    old = of(ops, read(path))
    found = problems(rows, old, excuses(version, json.loads(REASONS.read_text())))
    verdict = f"{len(found)} wrong" if found else "all well" if old else "within limits, no table to compare with"
    print(f"kernels: Triton {version}, {len(rows)} programs in {time.monotonic() - began:.0f} s: {verdict}", flush=True)
    for one in found:
        print(f"  {one}")
    if found and not write:
        print(f"  If it is meant: tools/compile_kernels.py --write, and a reason in {REASONS.relative_to(ROOT)}.")
    return 1 if found else 0


def elsewhere(version: str, ops: Sequence[str], *, write: bool) -> int:
    """The same with another Triton, in a process that finds it first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if version != INSTALLED:
        folder = ROOT / ".venv" / "tritons" / version
        if not folder.is_dir():
            print(f"kernels: Triton {version} is not there; run tools/tritons.py")
            return 1
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, __file__, "--here", *(f"--op={op}" for op in ops), *(["--write"] if write else [])]
    return subprocess.run(command, env=environment, check=False).returncode


def every(installed: str, pinned: Sequence[str]) -> Sequence[str]:
    """Which Tritons to use: a table is of a minor version, so one of them is enough."""
    minors = {version.rpartition(".")[0] for version in pinned}
    return pinned if installed.rpartition(".")[0] in minors else (INSTALLED, *pinned)


def main(arguments: Sequence[str]) -> int:
    pinned = sorted(path.stem for path in (ROOT / "tools" / "tritons").glob("*.txt"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--triton", choices=(INSTALLED, *pinned), help="only this one")
    operations = [family.op for family in FAMILIES]
    parser.add_argument("--op", action="append", default=[], choices=operations, help="only these, one flag for each")
    parser.add_argument("--write", action="store_true", help="write the tables anew")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.here:
        return here(given.op, write=given.write)
    versions = (given.triton,) if given.triton else every(metadata.version("triton"), pinned)
    return max(elsewhere(version, given.op, write=given.write) for version in versions)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
