"""The kernel benchmark without a GPU: the plan, the dry run, and real rows of a small family on the host."""

import io
import json
from functools import partial

import pytest
import torch
from support.host_gpu import HostGpu

from baton_kernels.capabilities import CPU
from baton_kernels.families import FAMILIES
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere
from bench.gpu import kernels
from bench.gpu.ceilings import Ceilings
from bench.gpu.inputs import argument_bytes
from bench.gpu.kernels import SMALL_LIMIT_S, Benchmark, chosen_families, main, plan
from bench.gpu.table import KernelReport, KernelRow, cells
from bench.gpu.timing import Timing

CEILINGS = Ceilings(copy_gbps=10.0, bf16_tflops=0.1)
HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Every row is measured for a moment; the budget of them all is never what decides."""
    monkeypatch.setattr(kernels, "ROW_S", 0.05)


class Shape:
    label = "any"
    dtype = torch.float32


class Doubling:
    programs = ()

    def __call__(self, x, out):
        return torch.mul(x, 2.0, out=out)


class Failing(Doubling):
    def __call__(self, x, out):
        raise RuntimeError("an illegal memory access was encountered")


def doubling_case(elements, name, goal=None):
    def draw(random, device):
        return Call(
            arguments={"x": torch.randn(elements, generator=random), "out": torch.empty(elements)}, outputs=("out",)
        )

    traffic = Traffic(bytes=8 * elements, flops=elements)
    return Case(name=name, shape=Shape(), make=draw, traffic=traffic, bench=True, goal=goal)


def family(*cases, operation=Doubling, optional=None):
    bind = lambda kind, *_: kind()  # noqa: E731
    implementations = [Implementation(name="torch", refuses=anywhere, bind=partial(bind, operation))]
    if optional is not None:
        other = Implementation(name="other", refuses=lambda *_: optional, bind=partial(bind, Doubling), optional=True)
        implementations.insert(0, other)
    return Family(op="double", implementations=tuple(implementations), shapes=lambda _: [], cases=lambda: cases)


def ran(*families, gpu=None, budget_s=3600.0, clock=None, path=None):
    report = KernelReport(provenance={"device": "host"}, settings={}, path=path, out=io.StringIO())
    report.begin({"copy_gbps": 10.0})
    keywords = {} if clock is None else {"clock": clock}
    bench = Benchmark(gpu or HostGpu(), CPU, CEILINGS, budget_s=budget_s, **keywords)
    bench.run(list(plan(families, CPU, HERE)), report)
    report.end()
    return report


# ---- rows -----------------------------------------------------------------------------------------------------------
def test_a_case_becomes_a_row_with_floor_time_and_fraction():
    row = ran(family(doubling_case(1 << 18, "large", goal=1e-9))).rows[0]
    assert row.bound == "mem"
    assert row.floor_s == pytest.approx((8 << 18) / 10e9)
    assert row.timing.p10_s <= row.timing.p50_s <= row.timing.p90_s
    assert row.fraction == pytest.approx(row.floor_s / row.timing.p50_s)
    assert row.verdict == "PASS"
    assert row.held_bytes == 8 << 18


def test_a_small_call_is_timed_in_a_graph_beside_its_launch_and_has_a_limit():
    row = ran(family(doubling_case(64, "small"))).rows[0]
    assert row.timing.calls > 1
    assert row.launch_s > 0.0
    assert row.limit_s == SMALL_LIMIT_S
    assert row.verdict in ("PASS", "FAIL")


def test_optional_implementations_stand_beside_the_chosen_one():
    rows = ran(family(doubling_case(64, "small"), optional="")).rows
    assert [row.implementation for row in rows] == ["torch", "other"]
    assert all(row.timing is not None for row in rows)


def test_an_optional_implementation_that_cannot_run_says_why():
    rows = ran(family(doubling_case(64, "small"), optional="it is not installed")).rows
    assert rows[1].verdict == "not run"
    assert "it is not installed" in rows[1].note
    assert not rows[1].failed


def test_a_row_that_fails_is_reported_and_the_others_run():
    rows = ran(family(doubling_case(64, "bad"), operation=Failing), family(doubling_case(64, "good"))).rows
    assert rows[0].verdict == "ERROR"
    assert "illegal memory access" in rows[0].note
    assert rows[1].timing is not None


def test_a_broken_device_leaves_the_others_undone_and_says_so():
    class Broken(HostGpu):
        def free_bytes(self):
            if self.free:
                self.free = 0
                return 64 << 30
            raise RuntimeError("the device is gone")

    rows = ran(family(doubling_case(64, "bad"), doubling_case(64, "next"), operation=Failing), gpu=Broken()).rows
    assert [row.verdict for row in rows] == ["ERROR", "ERROR"]
    assert rows[1].note.startswith("after an earlier row")


def test_what_does_not_fit_is_not_run():
    row = ran(family(doubling_case(1 << 20, "large")), gpu=HostGpu(free=1 << 20)).rows[0]
    assert row.verdict == "not run"
    assert row.note == "needs 0.0 GB, 0.0 GB are free"


def test_rows_behind_the_end_of_the_budget_are_not_run():
    rows = ran(family(doubling_case(64, "late")), budget_s=0.0).rows
    assert rows[0].verdict == "not run"
    assert "--budget-s" in rows[0].note


# ---- report ---------------------------------------------------------------------------------------------------------
def timed(p50_s, **more):
    timing = Timing(p10_s=p50_s * 0.9, p50_s=p50_s, p90_s=p50_s * 1.1, samples=9, calls=1)
    fields = {"bytes": 4_000_000, "flops": 0, "goal": None, "floor_s": 1e-6} | more
    return KernelRow(op="op", case="case", implementation="triton", dtype="bfloat16", timing=timing, **fields)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (timed(1.24e-6, goal=0.8), "PASS"),
        (timed(1.26e-6, goal=0.8), "FAIL"),
        (timed(2.9e-6, limit_s=3e-6), "PASS"),
        (timed(3.1e-6, limit_s=3e-6), "FAIL"),
        (timed(1.0), ""),
        (timed(1.0, failed=True), "ERROR"),
    ],
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict


def test_a_line_has_bytes_floor_percentiles_rates_and_goal():
    texts = cells(timed(2e-6, goal=0.4, bound="mem"))
    for text in ("0.0040", "1.0 mem", "2.0", "1.8-2.2", "2000", "0.50", "0.40", "PASS"):
        assert text in texts


def test_the_document_is_whole_after_every_row(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    report = KernelReport(provenance={"device": "host"}, settings={"a": 1}, path=path, out=io.StringIO())
    report.begin(None)
    for count, row in enumerate([timed(1e-6), timed(2e-6, goal=0.9)], start=1):
        report.add(row)
        assert len(json.loads(path.read_text())["rows"]) == count
    document = json.loads(path.read_text())
    assert document["rows"][1]["verdict"] == "FAIL"
    assert document["rows"][1]["fraction"] == pytest.approx(0.5)
    assert document["provenance"] == {"device": "host"}


# ---- dry run --------------------------------------------------------------------------------------------------------
def test_a_dry_run_plans_every_large_case_of_every_family(tmp_path, capsys):
    target = "gfx950"
    path = tmp_path / "dry.json"
    assert main(["--dry-run", "--target", target, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    large = {(one.op, case.name) for one in FAMILIES for case in one.cases() if case.bench}
    assert {(row["op"], row["case"]) for row in document["rows"]} == large
    assert all(row["implementation"] and row["note"] for row in document["rows"])
    assert {row["verdict"] for row in document["rows"]} == {"not run"}
    assert document["provenance"]["device"] == f"none: dry run for {target}"
    assert {"torch", "triton", "commit", "date"} <= document["provenance"].keys()
    assert "ceilings: not run" in capsys.readouterr().out


def test_an_operation_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="no operation nonsense; there are "):
        chosen_families(["nonsense"])


def test_the_size_of_a_row_is_that_of_its_inputs():
    case = doubling_case(1000, "any")
    assert next(iter(plan([family(case)], CPU, HERE))).row.held_bytes == argument_bytes(case, HERE) == 8000
