"""`python -m bench.gpu.sweep`: the fastest configuration of each shape class that the large cases use.

Candidates that do not compile, spill, use a stack or do not fit are dropped first, which needs no GPU: `--dry-run`
prints what is left. The others must agree with the shipped configuration and are then timed; the winners go into
`configs/<op>.json` with device, date, versions and the fraction of the floor that they reach.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from math import exp, log
from pathlib import Path
from typing import Any

import torch

from baton_kernels import configs
from baton_kernels.capabilities import Capabilities, named, of_device
from baton_kernels.registry import Case, Family, Implementation
from baton_kernels.rt.aot import Resources, resources
from baton_kernels.rt.program import CompileFailed, Config
from bench.gpu.agreement import disagreement
from bench.gpu.card import CudaGpu, Gpu, about
from bench.gpu.ceilings import Ceilings, measure_ceilings
from bench.gpu.combine import combined
from bench.gpu.config_file import write_rows
from bench.gpu.inputs import ROTATION_BYTES, make
from bench.gpu.kernels import chosen_families
from bench.gpu.timing import measure

CASE_S = 0.15  # of timing per candidate and case
MOST_SETS = 16  # of inputs of one case
CLEARLY = 0.99  # of the shipped configuration's time: a smaller gain is noise
SHIPPED_FOLDER = Path(configs.__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shape class of one implementation, with the cases that judge it, smallest first."""

    op: str
    implementation: Implementation[Any, Any]
    label: str
    cases: tuple[Case[Any], ...]
    shipped: Config
    candidates: tuple[Config, ...]  # the shipped one first

    @property
    def shapes(self) -> set[Any]:
        return {case.shape for case in self.cases}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A candidate after compilation; `dropped` says why it is out."""

    config: Config
    dropped: str
    used: tuple[Resources, ...] = ()  # per shape and program


@dataclass(frozen=True, slots=True, kw_only=True)
class Won:
    config: Config
    fraction: float  # of the floor, geometric mean over the cases
    timed: int  # candidates


def tasks(families: Sequence[Family[Any, Any]], capabilities: Capabilities) -> list[Task]:
    """Of every implementation that can be tuned and runs on this device."""
    found = []
    for family in families:
        large = sorted((case for case in family.cases() if case.bench), key=lambda case: case.shape.label)
        for implementation in family.implementations:
            if implementation.configs is None:
                continue
            for label, group in groupby(large, key=lambda case: case.shape.label):
                cases = tuple(sorted(group, key=lambda case: case.traffic.bytes))
                if any(implementation.refuses(capabilities, case.shape) for case in cases):
                    continue
                shipped = configs.find(family.op, capabilities, label).config
                distinct: list[Config] = [shipped]
                for one in implementation.configs(capabilities, cases[0].shape):
                    if one not in distinct:
                        distinct.append(one)
                found.append(
                    Task(
                        op=family.op,
                        implementation=implementation,
                        label=label,
                        cases=cases,
                        shipped=shipped,
                        candidates=tuple(distinct),
                    )
                )
    return found


# ---- without a GPU ----------------------------------------------------------------------------------------------
def prune(
    op: str, implementation: str, capabilities: Capabilities, shapes: Sequence[Any], config: Config
) -> tuple[str, tuple[Resources, ...]]:
    """Compile for the target. Why the candidate is out ("" = it is in), and what its programs use."""
    family = chosen_families([op])[0]
    bind = next(one for one in family.implementations if one.name == implementation).bind
    used: list[Resources] = []
    try:
        for shape in shapes:
            used += [resources(program) for program in bind(capabilities, shape, config).programs]
    except CompileFailed as error:
        return str(error), ()
    if any(one.spills or one.stack for one in used):
        return f"{sum(one.spills for one in used)} spills, {max(one.stack for one in used)} bytes of stack", tuple(used)
    return "", tuple(used)


def pruned(task: Task, capabilities: Capabilities, pool: ProcessPoolExecutor) -> list[Pruned]:
    """In the order of the candidates. The processes of the pool fill Triton's cache for this one."""
    shapes = sorted(task.shapes, key=repr)
    compiling = [
        pool.submit(prune, task.op, task.implementation.name, capabilities, shapes, dict(config))
        for config in task.candidates
    ]
    found = []
    for config, future in zip(task.candidates, compiling, strict=True):
        dropped, used = future.result()
        found.append(Pruned(config=config, dropped=dropped, used=used))
    return found


def told(task: Task, one: Pruned) -> str:
    text = " ".join(f"{name}={value}" for name, value in one.config.items())
    what = one.dropped
    if not what:
        registers, shared = max(use.registers for use in one.used), max(use.shared for use in one.used)
        what = f"{registers} registers, {shared} bytes shared"
    shipped = " (shipped)" if one.config == task.shipped else ""
    return f"  {'drop' if one.dropped else 'keep'} {text}{shipped}: {what}"


# ---- on a GPU ---------------------------------------------------------------------------------------------------
class Race:
    """The candidates of one task on one GPU."""

    def __init__(self, task: Task, capabilities: Capabilities, gpu: Gpu, ceilings: Ceilings) -> None:
        self._task = task
        self._gpu = gpu
        self._ceilings = ceilings
        self._bind = partial(task.implementation.bind, capabilities)
        self._agreeing: list[Config] = []
        self.costs: list[tuple[Config, float]] = []  # logarithm of time over floor, mean over the cases

    def run(self, candidates: Sequence[Config]) -> None:
        """Time those that agree with the first one ever given: the shipped one, unless that does not compile."""
        agreeing = [config for config in candidates if self._agrees(config)]
        logs = [0.0] * len(agreeing)
        for case in self._task.cases:
            floor_s, _ = self._ceilings.floor(case.traffic)
            count = min(max(1, ROTATION_BYTES // max(case.traffic.bytes, 1)), MOST_SETS)
            made = [make(case, self._gpu.torch_device, seed) for seed in range(count)]
            for index, config in enumerate(agreeing):
                calls = [partial(self._bind(case.shape, config), **call.arguments) for call in made]
                timing = measure(self._gpu, calls, floor_s, CASE_S)
                logs[index] += log(timing.p50_s / floor_s) / len(self._task.cases)
                print(f"  {case.name} {dict(config)}: {timing.p50_s * 1e6:.1f} µs, {floor_s / timing.p50_s:.2f}")
            del made
            self._gpu.free_bytes()
        self.costs += zip(agreeing, logs, strict=True)

    def won(self) -> Won | None:
        """The fastest, or the shipped one when that is as good. None when nothing ran."""
        if not self.costs:
            return None
        config, cost = min(self.costs, key=lambda one: one[1])
        if self.costs[0][0] == self._task.shipped and exp(cost - self.costs[0][1]) > CLEARLY:
            config, cost = self.costs[0]
        return Won(config=config, fraction=exp(-cost), timed=len(self.costs))

    def _agrees(self, config: Config) -> bool:
        if self._agreeing:
            case, device = self._task.cases[0], self._gpu.torch_device
            if why := disagreement(case, self._bind, self._agreeing[0], config, device):
                print(f"  wrong {dict(config)}: {why}")
                return False
        self._agreeing.append(config)
        return True


def sweep(
    task: Task,
    survivors: Sequence[Config],
    capabilities: Capabilities,
    gpu: Gpu,
    ceilings: Ceilings,
    fits: Callable[[Config], bool],
) -> Won | None:
    """The winner among the survivors and, where fields were varied in groups, what the winners of the groups give
    together, if that fits. None when no candidate is left."""
    race = Race(task, capabilities, gpu, ceilings)
    race.run(survivors)
    grid = [(config, cost) for config, cost in race.costs if config != task.shipped]
    joined = combined(grid)
    if joined is not None and joined not in [config for config, _ in race.costs] and fits(joined):
        race.run([joined])
    return race.won()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sweep", description=__doc__)
    parser.add_argument("--op", nargs="+", help="these operations only")
    parser.add_argument("--dry-run", action="store_true", help="compile and prune, on any machine")
    parser.add_argument("--target", default="sm_90", help="architecture that a dry run compiles for")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no shape class is begun after it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--configs", type=Path, default=SHIPPED_FOLDER, help="folder of the tables to write")
    options = parser.parse_args(arguments)
    end_s = time.monotonic() + options.budget_s
    families = chosen_families(options.op)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        if options.dry_run:
            _print_candidates(tasks(families, named(options.target)), named(options.target), pool)
            return
        _sweep_all(families, torch.device(options.device), end_s, options.configs, pool)


def _print_candidates(todo: Sequence[Task], capabilities: Capabilities, pool: ProcessPoolExecutor) -> None:
    for task in todo:
        found = pruned(task, capabilities, pool)
        kept = sum(not one.dropped for one in found)
        print(f"{task.op} {task.label} on {capabilities.name}: {kept} of {len(found)} candidates are left")
        print("\n".join(told(task, one) for one in found), flush=True)


def _sweep_all(
    families: Sequence[Family[Any, Any]],
    device: torch.device,
    end_s: float,
    folder: Path,
    pool: ProcessPoolExecutor,
) -> None:
    capabilities, gpu, card = of_device(device), CudaGpu(device), about(device)
    ceilings = measure_ceilings(gpu, capabilities)
    print(f"{card['device']}: {asdict(ceilings)}", flush=True)
    for task in tasks(families, capabilities):
        if time.monotonic() > end_s:
            print(f"{task.op} {task.label}: the time is up")
            continue
        survivors = [one.config for one in pruned(task, capabilities, pool) if not one.dropped]

        def fits(config: Config, task: Task = task) -> bool:
            return not pruned(replace(task, candidates=(config,)), capabilities, pool)[0].dropped

        won = sweep(task, survivors, capabilities, gpu, ceilings, fits)
        if won is None:
            print(f"{task.op} {task.label}: no candidate is left")
            continue
        print(f"{task.op} {task.label}: {dict(won.config)}, fraction {won.fraction:.2f} of the floor", flush=True)
        write_rows(folder, task.op, capabilities, {task.label: won.config}, provenance(card, won))


def provenance(card: Mapping[str, object], won: Won) -> str:
    """One line for the table."""
    date = str(card["date"]).split()[0]
    return (
        f"swept on {card['device']}, {date}, torch {card['torch']}, Triton {card['triton']}: "
        f"best of {won.timed}, fraction {won.fraction:.2f}"
    )


if __name__ == "__main__":
    main()
