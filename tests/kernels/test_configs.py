"""Configuration tables: which row is found, and that every row that ships is well formed and can be asked for."""

import json
import re
from dataclasses import replace
from importlib import resources

import pytest

from baton_kernels import configs
from baton_kernels.capabilities import CPU, NAMED, named
from baton_kernels.families import FAMILIES
from baton_kernels.rt.program import OPTIONS

TUNED = ("hopper", "blackwell", "cdna3", "cdna4")


def rows(how, **found):
    return {"how": how, "rows": {name: {"BLOCK": block} for name, block in found.items()}}


TABLES = [
    {"family": "hopper", "triton": "3.6", **rows("swept on a H200", default=1, wide=2)},
    {"family": "hopper", "triton": "3.9", **rows("compiled, not timed", default=3)},
    {"family": "cdna3", "triton": "3.9", **rows("compiled, not timed", default=4)},
]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(configs, "_tables", {"op": TABLES, "bare": []}.__getitem__)


@pytest.mark.parametrize(("triton", "block"), [((3, 6), 1), ((3, 7), 1), ((3, 8), 3), ((3, 9), 3), ((3, 12), 3)])
def test_the_table_of_the_nearest_triton_is_taken(tables, triton, block):
    row = configs.find("op", replace(named("sm_90"), triton=triton), "other")
    assert row.config == {"BLOCK": block}


def test_a_row_of_the_shape_class_goes_before_the_default_and_says_where_it_was_found(tables):
    row = configs.find("op", replace(named("sm_90"), triton=(3, 6)), "wide")
    assert row.config == {"BLOCK": 2}
    assert row.source == "hopper, Triton 3.6, row wide: swept on a H200"


def test_an_architecture_without_a_table_borrows_and_says_so(tables):
    row = configs.find("op", named("sm_80"), "wide")
    assert row.config == {"BLOCK": 2}
    assert row.source == "no table for ampere; borrowed from hopper, Triton 3.6, row wide: swept on a H200"


def test_an_operation_without_tables_has_nothing_to_configure(tables):
    assert configs.find("bare", CPU, "any").config == {}


FILES = sorted(
    one.name.removesuffix(".json") for one in resources.files(configs).iterdir() if one.name.endswith("json")
)
TUNABLE = {family.op: family for family in FAMILIES if any(one.configs is not None for one in family.implementations)}


def read(op):
    return json.loads((resources.files(configs) / f"{op}.json").read_text())


def test_every_tunable_operation_has_a_file_and_every_file_an_operation():
    assert sorted(TUNABLE) == FILES


@pytest.mark.parametrize("op", sorted(TUNABLE))
def test_tables_say_for_what_and_from_where_they_are(op):
    content = read(op)
    assert content["op"] == op
    named_twice = [(table["family"], table["triton"]) for table in content["tables"]]
    assert len(set(named_twice)) == len(named_twice)
    assert set(TUNED) <= {table["family"] for table in content["tables"]}
    for table in content["tables"]:
        assert set(table) <= {"family", "triton", "how", "rows", "swept"}
        assert table["family"] in {one.family for one in NAMED.values()}
        assert re.fullmatch(r"3\.\d+", table["triton"])
        assert table["how"] == "compiled, not timed"
        assert configs.DEFAULT in table["rows"]
        for label, how in table.get("swept", {}).items():
            assert label in table["rows"]
            assert re.match(r"swept on .*\d{4}-\d\d-\d\d", how)


@pytest.mark.parametrize("op", sorted(TUNABLE))
def test_rows_name_the_fields_that_a_sweep_would_try_and_shape_classes_that_are_compiled_ahead(op):
    family = TUNABLE[op]
    for table in read(op)["tables"]:
        devices = [one for one in NAMED.values() if one.family == table["family"]]
        labels = {shape.label for one in devices for shape in family.shapes(one)}
        fields = {
            name
            for one in family.implementations
            if one.configs is not None
            for device in devices
            for shape in family.shapes(device)
            for config in one.configs(device, shape)
            for name in config
        }
        for label, config in table["rows"].items():
            assert label == configs.DEFAULT or label in labels, f"nobody compiles {label} for {table['family']}"
            assert set(config) <= fields | set(OPTIONS), f"{label}: no sweep tries {set(config) - fields}"
            assert all(type(value) in (int, bool) for value in config.values())
            assert config.get("num_warps", 4) in (1, 2, 4, 8, 16)
