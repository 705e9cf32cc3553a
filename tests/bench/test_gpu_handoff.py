"""The handoff benchmark of a GPU, with host memory in its place."""

import json

import pytest
from support.kv_wires import needs

from bench.gpu.handoff import main


@pytest.mark.parametrize("wire", [pytest.param("nixl", marks=needs("nixl"))])
def test_a_dry_run_goes_the_whole_way(wire, tmp_path):
    assert main(["--dry-run", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["value"] > 0 for row in rows] == [True, True, True]
    assert not any("wrong" in row["note"] for row in rows)
