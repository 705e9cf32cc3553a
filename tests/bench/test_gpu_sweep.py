"""Sweeps without a GPU: candidates, pruning, choice of the winner, and the table that is written."""

import dataclasses
import json
import pickle
from functools import partial

import pytest
import torch
from support.host_gpu import ScriptedGpu

from baton_kernels import configs
from baton_kernels.capabilities import named
from baton_kernels.families import FAMILIES
from baton_kernels.registry import Call, Case, Implementation, Traffic, anywhere
from baton_kernels.rt.aot import Resources
from baton_kernels.rt.program import CompileFailed
from bench.gpu import sweep as sweeping
from bench.gpu.agreement import disagreement
from bench.gpu.ceilings import Ceilings
from bench.gpu.combine import combined
from bench.gpu.config_file import write_rows
from bench.gpu.sweep import Task, Won, provenance, prune, sweep, tasks, told

HOPPER = named("sm_90")
HERE = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1e-3, bf16_tflops=1.0)


class Shape:
    label = "any"


def case(name="case", elements=64):
    def draw(random, device):
        return Call(
            arguments={"x": torch.randn(elements, generator=random), "out": torch.empty(elements)}, outputs=("out",)
        )

    traffic = Traffic(bytes=8 * elements, flops=0)
    return Case(name=name, shape=Shape(), make=draw, traffic=traffic, bench=True)


class Doubling:
    """Takes SLOW + MORE hundredths of a second on a scripted GPU; wrong where WRONG."""

    programs = ()

    def __init__(self, config):
        self._config = config

    def __call__(self, x, out):
        torch.mul(x, 3.0 if self._config.get("WRONG") else 2.0, out=out)
        if self._config.get("LEAVES_OUT"):
            out[3] = float("nan")
        return 0.01 * (self._config.get("SLOW", 1) + self._config.get("MORE", 0))


def task(*candidates, shipped):
    implementation = Implementation(
        name="triton", refuses=anywhere, bind=lambda _capabilities, _shape, config: Doubling(config)
    )
    return Task(
        op="double", implementation=implementation, label="any", cases=(case("a"), case("b", 256)),
        shipped=shipped, candidates=candidates,
    )  # fmt: skip


# ---- candidates -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942", "gfx950"])
def test_every_tunable_shape_class_has_the_shipped_configuration_first(target):
    found = tasks(FAMILIES, named(target))
    assert found
    for one in found:
        assert one.candidates[0] == one.shipped
        texts = [json.dumps(dict(config), sort_keys=True) for config in one.candidates]
        assert len(set(texts)) == len(texts)
        assert {case.shape.label for case in one.cases} == {one.label}
        assert [case.traffic.bytes for case in one.cases] == sorted(case.traffic.bytes for case in one.cases)


def used(**fields):
    return Resources(**{"registers": 40, "spills": 0, "stack": 0, "shared": 1024, "code": {}, **fields})


@pytest.mark.parametrize(
    ("resources", "dropped"),
    [(used(), ""), (used(spills=3), "3 spills, 0 bytes of stack"), (used(stack=8), "0 spills, 8 bytes of stack")],
)
def test_what_spills_or_has_a_stack_is_dropped(monkeypatch, resources, dropped):
    monkeypatch.setattr(sweeping, "resources", lambda program: resources)
    family = FAMILIES[0]
    shape = family.shapes(HOPPER)[0]
    config = family.implementations[0].configs(HOPPER, shape)[0]
    why, what = prune(family.op, family.implementations[0].name, HOPPER, [shape], config)
    assert why == dropped
    assert what == (resources,)


def test_what_does_not_compile_is_dropped_with_the_compilers_reason(monkeypatch):
    def refuse(program):
        raise CompileFailed("needs 300000 bytes of shared memory")

    monkeypatch.setattr(sweeping, "resources", refuse)
    family = FAMILIES[0]
    shape = family.shapes(HOPPER)[0]
    config = family.implementations[0].configs(HOPPER, shape)[0]
    assert prune(family.op, family.implementations[0].name, HOPPER, [shape], config) == (
        "needs 300000 bytes of shared memory", (),
    )  # fmt: skip


def test_a_dry_run_says_what_is_kept_and_what_is_dropped():
    one = task({"num_warps": 4}, {"num_warps": 8}, shipped={"num_warps": 4})
    kept = sweeping.Pruned(config={"num_warps": 4}, dropped="", used=(used(),))
    out = sweeping.Pruned(config={"num_warps": 8}, dropped="3 spills, 0 bytes of stack")
    assert told(one, kept) == "  keep num_warps=4 (shipped): 40 registers, 1024 bytes shared"
    assert told(one, out) == "  drop num_warps=8: 3 spills, 0 bytes of stack"


# ---- the winner -----------------------------------------------------------------------------------------------------
def swept(monkeypatch, one):
    monkeypatch.setattr(sweeping, "CASE_S", 0.01)
    return sweep(one, one.candidates, HOPPER, ScriptedGpu(), CEILINGS, lambda config: True)


def test_the_fastest_candidate_wins(monkeypatch):
    slow, fast = {"SLOW": 30}, {"SLOW": 1}
    won = swept(monkeypatch, task(slow, fast, shipped=slow))
    assert won.config == fast
    assert won.fraction > 0.0
    assert won.timed == 2


def test_a_fast_candidate_with_another_result_is_not_timed(monkeypatch, capsys):
    shipped, wrong = {"SLOW": 3}, {"SLOW": 1, "WRONG": 1}
    won = swept(monkeypatch, task(shipped, wrong, shipped=shipped))
    assert won.config == shipped
    assert "wrong" in capsys.readouterr().out


def test_nothing_wins_when_nothing_compiles(monkeypatch):
    assert sweep(task(shipped={}), [], HOPPER, ScriptedGpu(), CEILINGS, lambda config: True) is None


def test_fields_that_vary_together_are_one_group_and_the_winners_of_groups_are_joined():
    base = {"A": 1, "B": 1, "C": 1, "D": 1}
    grid = [
        (base | {"A": 2}, 5.0), (base | {"A": 2, "B": 2}, 3.0), (base | {"B": 2}, 4.0),
        (base | {"C": 2}, 9.0), (base | {"C": 3}, 7.0), (base, 8.0), (base | {"D": 2}, 8.5),
    ]  # fmt: skip
    assert combined(grid) == {"A": 2, "B": 2, "C": 3, "D": 1}


def test_a_whole_grid_is_one_group():
    grid = [({"A": a, "B": b}, float(a + b)) for a in (1, 2, 3) for b in (1, 2)]
    assert combined(grid) is None
    assert combined([]) is None


@pytest.mark.parametrize("fits", [True, False])
def test_the_joined_winner_is_timed_too_unless_it_does_not_fit(monkeypatch, fits):
    monkeypatch.setattr(sweeping, "CASE_S", 0.01)
    base = {"SLOW": 40, "MORE": 40}
    grid = [base, base | {"SLOW": 1}, base | {"MORE": 1}, base | {"SLOW": 39}, base | {"MORE": 39}]
    one = task(*grid, shipped=base)
    won = sweep(one, one.candidates, HOPPER, ScriptedGpu(), CEILINGS, lambda config: fits)
    assert (won.config == {"SLOW": 1, "MORE": 1}) == fits
    assert won.timed == len(grid) + fits


@pytest.mark.parametrize(
    ("config", "why"), [({}, ""), ({"WRONG": 1}, "differs by"), ({"LEAVES_OUT": 1}, "not written")]
)
def test_candidates_are_compared_with_the_shipped_one(config, why):
    found = disagreement(case(), lambda shape, chosen: Doubling(chosen), {}, config, HERE)
    assert (found == "") == (why == "")
    assert why in found


# ---- the table ------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    table = {"family": "hopper", "triton": "3.7", "how": "compiled, not timed", "rows": {"default": {"num_warps": 8}}}
    other = table | {"family": "cdna3"}
    (tmp_path / "double.json").write_text(json.dumps({"op": "double", "tables": [table, other]}))
    return tmp_path


def found(monkeypatch, folder, capabilities, label):
    tables = json.loads((folder / "double.json").read_text())["tables"]
    monkeypatch.setattr(configs, "_tables", lambda op: tables)
    return configs.find("double", capabilities, label)


def with_triton(minor):
    return dataclasses.replace(HOPPER, triton=(3, minor))


def test_a_swept_row_carries_its_own_provenance(monkeypatch, folder):
    write_rows(folder, "double", with_triton(7), {"w64": {"num_warps": 2}}, "swept on NVIDIA H200, fraction 0.91")
    row = found(monkeypatch, folder, with_triton(7), "w64")
    assert row.config == {"num_warps": 2}
    assert row.source == "hopper, Triton 3.7, row w64: swept on NVIDIA H200, fraction 0.91"
    assert found(monkeypatch, folder, with_triton(7), "other").source.endswith("row default: compiled, not timed")


def test_another_triton_gets_a_table_of_its_own_with_the_rows_of_the_nearest(monkeypatch, folder):
    write_rows(folder, "double", with_triton(7), {"w32": {"num_warps": 1}}, "swept in May with Triton 3.7")
    write_rows(folder, "double", with_triton(6), {"w64": {"num_warps": 2}}, "swept")
    assert found(monkeypatch, folder, with_triton(6), "w64").source == "hopper, Triton 3.6, row w64: swept"
    taken_over = found(monkeypatch, folder, with_triton(6), "w32").source
    assert taken_over == "hopper, Triton 3.6, row w32: swept in May with Triton 3.7"
    assert found(monkeypatch, folder, with_triton(7), "w64").config == {"num_warps": 8}
    tables = json.loads((folder / "double.json").read_text())["tables"]
    assert [table["family"] for table in tables] == ["hopper", "cdna3", "hopper"]


def test_a_second_sweep_replaces_what_the_first_one_found(monkeypatch, folder):
    for warps, words in ((2, "swept in June"), (4, "swept in July")):
        write_rows(folder, "double", with_triton(7), {"w64": {"num_warps": warps}}, words)
    row = found(monkeypatch, folder, with_triton(7), "w64")
    assert (row.config, row.source[-13:]) == ({"num_warps": 4}, "swept in July")


def test_writing_nothing_new_leaves_shipped_tables_as_they_are(tmp_path):
    """The layout of the files is the writer's, so that a sweep changes the lines that it means to change."""
    for family in FAMILIES:
        shipped = sweeping.SHIPPED_FOLDER / f"{family.op}.json"
        if shipped.is_file():
            (tmp_path / shipped.name).write_text(shipped.read_text())
            write_rows(tmp_path, family.op, with_triton(7), {}, "")
            assert json.loads((tmp_path / shipped.name).read_text()) == json.loads(shipped.read_text())


def test_provenance_names_device_date_versions_and_fraction():
    card = {"device": "NVIDIA H200", "date": "2026-12-01 10:00:00", "torch": "2.11.0", "triton": "3.6.0"}
    words = provenance(card, Won(config={}, fraction=0.912, timed=7))
    assert words == "swept on NVIDIA H200, 2026-12-01, torch 2.11.0, Triton 3.6.0: best of 7, fraction 0.91"


def test_the_compiler_processes_can_be_given_every_task():
    for one in tasks(FAMILIES, HOPPER):
        pickle.dumps(partial(prune, one.op, one.implementation.name, HOPPER, sorted(one.shapes, key=repr)))
