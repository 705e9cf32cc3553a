"""`make gpu` without a GPU: parts, their reports, the name of the result."""

import json
import sys

import pytest
import torch

from bench.gpu.__main__ import PARTS, Part, file_name, main, run


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H200", "gpu-h200-2026-12-01.json"),
        ("NVIDIA GeForce RTX 4090", "gpu-geforce-rtx-4090-2026-12-01.json"),
        ("AMD Instinct MI355X", "gpu-instinct-mi355x-2026-12-01.json"),
    ],
)
def test_results_are_named_after_device_and_date(card, name):
    assert file_name(card, "2026-12-01") == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: this would measure it")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 1
    assert "--dry-run" in capsys.readouterr().out


def test_a_part_runs_dry(tmp_path):
    engine = next(part for part in PARTS if part.name == "engine")
    assert run(engine, tmp_path, dry=True)["status"] == 0


def test_what_a_part_writes_is_in_the_result_and_its_failure_too(tmp_path, monkeypatch):
    program = "import json, sys; json.dump({'rows': [1]}, open(sys.argv[2], 'w')); sys.exit(3)"
    (tmp_path / "made_up.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run(Part(name="made", command=("made_up",), writes=True), tmp_path, dry=False)
    assert (found["status"], found["report"]) == (3, {"rows": [1]})
    assert json.dumps(found)


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys.modules["bench.gpu.__main__"], "PART_S", 0.3)
    assert run(Part(name="hangs", command=("hangs",), writes=False), tmp_path, dry=False)["status"] == -1
