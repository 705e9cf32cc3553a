"""What compiled code needs is read from the binary, and a kernel that got worse than its committed row is found.

The compilations of all kernels are `make kernels` (tools/compile_kernels.py); here are its judgement, and the tables.
"""

import json
import re
from dataclasses import asdict, replace
from fnmatch import fnmatchcase

import pytest
import torch
from support.tool import tool

from baton_kernels.capabilities import named
from baton_kernels.rt.aot import Resources, amd_resources, missing, resources, sass_code
from baton_kernels.rt.language import INTERPRETED, jit, operand, tl
from baton_kernels.rt.program import Program, pointer

CHECK = tool("compile_kernels")
TABLES = sorted(CHECK.TABLES.glob("3.*.json"))
GOOD = Resources(
    registers=80, spills=0, scalar_spills=0, stack=0, shared=4096, code={"HGMMA": 8, "LDG.128": 2, "LDG.32": 1}
)


# ---- reading --------------------------------------------------------------------------------------------------------
def test_nvidias_assembly_is_counted_by_kind_and_width():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0020*/              @!P1 LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0030*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR6][R2.64] ;
        /*0050*/              @UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0080*/                   HFMA2.MMA.BF16_V2 R1, -RZ, RZ, 0, 0 ;
        /*0090*/                   STL.64 [R1], R2 ;
        /*10000*/                  STG.E.64 desc[UR6][R2.64], R4 ;
    """
    assert sass_code(text) == {
        "LDG.128": 1, "LDG.16": 1, "LDG.32": 1, "LDGSTS.128": 1, "UTMALDG": 1, "HGMMA": 1, "UTCHMMA": 1, "STL": 1,
        "STG.64": 1,
    }  # fmt: skip


def test_amds_assembly_brings_its_numbers_along():
    text = """
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	buffer_load_dwordx4 v1, s[4:7], 0 offen lds
	global_load_lds_dwordx4 v[2:3], off
	v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]
	global_store_short v[2:3], v1, off
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     90
    .vgpr_spill_count: 3
    """
    assert amd_resources(text, 512) == Resources(
        registers=90,
        spills=3,
        scalar_spills=1,
        stack=16,
        shared=512,
        code={"load_dwordx4": 1, "load_lds_dwordx4": 2, "store_short": 1, "v_mfma_f32_16x16x32_bf16": 1},
    )


@jit
def _product(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(OUT + at, tl.dot(operand(tl.load(X + at)), operand(tl.load(Y + at))))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [
        ("sm_90", 16, r"HMMA"),
        ("sm_90", 64, r"HGMMA"),
        ("sm_100", 128, r"UTCHMMA"),
        ("gfx942", 64, r"v_mfma_f32_\w+_bf16"),
        ("gfx950", 64, r"v_mfma_f32_\w+_bf16"),
    ],
)
def test_the_code_of_a_device_that_is_not_here_is_read(name, size, kind):
    program = Program(
        _product,
        types={"X": pointer(torch.bfloat16), "Y": pointer(torch.bfloat16), "OUT": pointer(torch.float32)},
        constants={"N": size},
        config={"num_warps": 4, "num_stages": 1},
        capabilities=named(name),
    )
    found = resources(program)
    assert any(re.fullmatch(kind, one) for one in found.code)
    assert found.registers > 0
    assert found.shared <= named(name).shared_bytes
    assert (found.spills, found.stack) == (0, 0)
    assert missing(("matrix",), named(name), found.code) == ()
    assert (missing(("widest matrix",), named(name), found.code) == ()) == (size > 16)


@pytest.mark.parametrize(
    ("name", "code", "lacks"),
    [
        ("sm_90", {"HMMA": 1}, ("widest matrix", "descriptor", "wide load")),
        ("sm_90", {"HGMMA": 1, "UTMALDG": 1}, ()),
        ("sm_100", {"HMMA": 1, "LDGSTS.128": 1}, ("widest matrix", "descriptor")),
        ("sm_80", {"HMMA": 1, "LDG.128": 1}, ()),
        ("gfx950", {"load_dwordx4": 1}, ("matrix", "widest matrix")),
        ("gfx950", {"v_mfma_f32_16x16x32_bf16": 1, "load_lds_dwordx4": 1}, ()),
    ],
)
def test_an_expectation_is_met_by_the_instructions_that_the_device_has_for_it(name, code, lacks):
    assert missing(("matrix", "widest matrix", "descriptor", "wide load"), named(name), code) == lacks


# ---- judging --------------------------------------------------------------------------------------------------------
def row(**found):
    return CHECK.Row(name="k", resources=replace(GOOD, **found))


def committed(**found):
    return {"k": {**asdict(GOOD), **found}}


def problems(rows, table, *, excused=False):
    return CHECK.problems(rows, table, lambda _name: excused)


def test_a_row_as_good_as_the_committed_one_or_better_passes():
    assert problems({"k": row()}, committed()) == []
    assert problems({"k": row(registers=88)}, committed()) == []
    assert problems({"k": row(registers=40, shared=0)}, committed()) == []
    assert problems({"k": row(code={"HGMMA": 1, "LDG.128": 1})}, committed()) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"registers": 89}, ["k: 89 registers, was 80"]),
        ({"shared": 4097}, ["k: 4097 shared, was 4096"]),
        ({"spills": 2}, ["k: 2 spills", "k: 2 spills, was 0"]),
        ({"scalar_spills": 2}, ["k: 2 scalar spills", "k: 2 scalar_spills, was 0"]),
        ({"stack": 8}, ["k: 8 bytes of stack", "k: 8 stack, was 0"]),
        ({"code": {"HMMA": 8, "LDG.32": 9}}, ["k: lost its HGMMA", "k: lost its LDG.128"]),
    ],
)
def test_a_row_that_got_worse_is_said_with_what_it_was(found, said):
    assert problems({"k": row(**found)}, committed()) == said


def test_spills_a_stack_and_instructions_that_are_not_there_need_a_reason():
    bad = replace(row(spills=2, stack=8), missing=("widest matrix",))
    assert problems({"k": bad}, committed(spills=2, stack=8)) == [
        "k: lacks a widest matrix instruction", "k: 2 spills", "k: 8 bytes of stack",
    ]  # fmt: skip
    assert problems({"k": bad}, committed(spills=2, stack=8), excused=True) == []
    assert problems({"k": row(spills=3)}, committed(spills=2), excused=True) == ["k: 3 spills, was 2"]


def test_what_does_not_compile_needs_a_reason_and_stays_wrong_where_it_once_did():
    failed = CHECK.Row(name="k", failure="k for sm_90: made to fail")
    for excused in (False, True):
        assert problems({"k": failed}, committed(), excused=excused) == ["k: k for sm_90: made to fail"]
    assert problems({"k": failed}, {"k": {"failed": "…"}}, excused=True) == []
    assert problems({"k": row()}, {"k": {"failed": "…"}}) == []


def test_a_reason_is_for_rows_of_a_pattern_on_the_tritons_of_a_pattern():
    excused = CHECK.excuses("3.6", {"3.6 gfx942 attention *": "…", "* sm_90 mla d576 *": "…"})
    assert excused("gfx942 attention d64 attend:decode #2")
    assert excused("sm_90 mla d576 _mla")
    assert not excused("gfx950 attention d64 attend:decode")
    assert not CHECK.excuses("3.9", {"3.6 *": "…"})("sm_90 mla d576 _mla")


def test_a_program_without_a_row_and_a_row_without_a_program_are_wrong():
    assert problems({"k": row()}, {}) == ["k: has no row in the table"]
    assert problems({}, committed()) == ["k: nothing is compiled for this row any more"]


def test_a_triton_without_a_table_is_held_to_the_limits_alone():
    assert problems({"k": row(registers=255)}, None) == []
    assert problems({"k": row(spills=1)}, None) == ["k: 1 spills"]


def test_some_operations_can_be_looked_at_alone():
    table = {"sm_90 norm w64 _rows": {}, "sm_90 norm_wide w64 _rows": {}, "gfx942 norm w64 _rows #2": {}}
    assert list(CHECK.of(["norm"], table)) == ["sm_90 norm w64 _rows", "gfx942 norm w64 _rows #2"]
    assert CHECK.of([], table) == table
    assert CHECK.of(["norm"], None) is None
    assert {task.op for task in CHECK.tasks(["rms_norm"])} == {"rms_norm"}
    assert {(task.op, task.target) for task in CHECK.tasks([])} >= {("rms_norm", target) for target in CHECK.TARGETS}


def test_the_installed_triton_is_left_out_where_one_of_its_version_is_pinned():
    assert CHECK.every("3.7.1", ["3.6.0", "3.9.0"]) == ("installed", "3.6.0", "3.9.0")
    assert CHECK.every("3.9.1", ["3.6.0", "3.9.0"]) == ["3.6.0", "3.9.0"]


def test_programs_that_share_a_name_are_numbered():
    first, second = row(), row(registers=1)
    assert CHECK.numbered([first, second]) == {"k": first, "k #2": second}


def test_a_table_is_written_a_line_per_row(tmp_path):
    lacking = replace(row(), missing=("descriptor",))
    text = CHECK.rendered(CHECK.as_table({"k": row(), "a": CHECK.Row(name="a", failure="no"), "b": lacking}))
    path = tmp_path / "3.7.json"
    path.write_text(text)
    assert CHECK.read(path) == {
        "a": {"failed": "no"},
        "b": {**asdict(GOOD), "lacks": ["descriptor"]},
        "k": asdict(GOOD),
    }
    assert [line.split(":")[0].strip() for line in text.splitlines()] == ['{"rows"', '"a"', '"b"', '"k"', "}}"]
    assert CHECK.read(tmp_path / "3.8.json") is None


# ---- the tables that are committed ----------------------------------------------------------------------------------
def test_the_oldest_and_the_newest_triton_have_a_table():
    assert {"3.6", "3.9"} <= {path.stem for path in TABLES}
    assert {path.stem for path in (CHECK.ROOT / "tools" / "tritons").glob("*.txt")} == {"3.6.0", "3.9.0"}


def beyond_limits():
    """Names of committed rows that need a reason, with their Triton."""
    return [
        f"{path.stem} {name}"
        for path in TABLES
        for name, found in CHECK.read(path).items()
        if {"failed", "lacks"} & set(found) or found["spills"] or found["scalar_spills"] or found["stack"]
    ]


def test_a_committed_row_is_within_the_limits_or_there_is_a_reason():
    reasons = json.loads(CHECK.REASONS.read_text())
    assert [name for name in beyond_limits() if not any(fnmatchcase(name, one) for one in reasons)] == []


def test_every_reason_is_needed_and_says_something():
    for pattern, reason in json.loads(CHECK.REASONS.read_text()).items():
        assert any(fnmatchcase(name, pattern) for name in beyond_limits()), f"{pattern} excuses nothing any more"
        assert len(reason) > 20


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_shape_has_a_row_for_every_target(path):
    there = {tuple(name.split()[:3]) for name in CHECK.read(path)}
    wanted = {
        (target, family.op, shape.label)
        for target in CHECK.TARGETS
        for family in CHECK.FAMILIES
        for shape in family.shapes(named(target))
    }
    assert there == wanted, "tools/compile_kernels.py --write"
