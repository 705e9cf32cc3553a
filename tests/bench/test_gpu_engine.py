"""The engine benchmark on the host with a tiny shape: the same rows, goals and reasons as on a GPU."""

import io
import time

import pytest
from rich.console import Console

from baton_engine.config import EngineConfig
from baton_engine.exec.device import open_device
from bench.gpu.ceilings import Ceilings
from bench.gpu.engine import DECODES, PREFILLS, DecodeRow, EngineBench, PrefillRow, main
from bench.models import LLAMA_3_1_8B
from bench.report import Report

TINY = LLAMA_3_1_8B | {
    "head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
CONFIG = EngineConfig(dtype="float32", context_tokens=512, max_rows=4, step_tokens=128, pages=16)
CEILINGS = Ceilings(copy_gbps=10.0, bf16_tflops=0.1)


@pytest.fixture
def report():
    return Report(title="tiny", console=Console(file=io.StringIO(), width=200))


def measured(report, end_s):
    bench = EngineBench(TINY, open_device("cpu", threads=1), CONFIG, CEILINGS, end_s=end_s)
    decodes = [DecodeRow(batch=2, context=64, goal=0.0), DecodeRow(batch=4, context=400, goal=0.5)]
    try:
        return bench.measure(report, decodes, [PrefillRow(tokens=32, goal=None)])
    finally:
        bench.close()


def test_rows_have_value_floor_and_goal_and_what_does_not_fit_is_named(report):
    left_out = measured(report, time.monotonic() + 60)
    assert [row.name for row in report.rows] == ["prefill 32", "decode batch 2, context 64"]
    assert all(row.value > 0 and row.ceiling > 0 for row in report.rows)
    assert report.rows[1].verdict == "PASS"
    assert left_out == ["decode batch 4, context 400: needs 32 pages, the pool has 16"]


def test_rows_behind_the_end_of_the_budget_are_named(report):
    left_out = measured(report, time.monotonic())
    assert report.rows == []
    assert left_out[:2] == ["prefill 32: the time is up", "decode batch 2, context 64: the time is up"]


def test_a_dry_run_prints_a_floor_for_every_row(capsys):
    main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert "not measured here" in lines[0]
    assert len(lines) == 1 + len(DECODES) + len(PREFILLS)
