"""Paged attention's door: what it refuses and why, plans that hold for a captured graph, states that can be merged."""

from dataclasses import replace

import pytest
import torch
from support.kernel_cases import run_case

from baton_kernels import configs
from baton_kernels.attention.cases import Batch, make, shape_of
from baton_kernels.attention.merge import TorchMerge
from baton_kernels.attention.paged import FAMILY, TritonAttention
from baton_kernels.attention.reference import TorchAttention
from baton_kernels.attention.shape import Scores
from baton_kernels.attention.work import Capacity
from baton_kernels.capabilities import NAMED, named
from baton_kernels.oracle import Unsupported, choices
from baton_kernels.registry import Case
from baton_kernels.rt.language import INTERPRETED
from baton_kernels.rt.program import InputError

HERE = torch.device("cpu")
LLAMA = shape_of(32, 8, 128)
SMALL = shape_of(4, 2, 64, 16, dtype=torch.float32)
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]


def triton(shape, target="sm_90"):
    capabilities = named(target)
    return TritonAttention(capabilities, shape, configs.find("attention", capabilities, shape.label).config)


def call(shape, *rows, window=None, seed=0):
    made = make(shape, Batch(rows=rows, window=window), torch.Generator().manual_seed(seed), HERE)
    return dict(made.arguments)


def planned(operation, rows, **options):
    """Plan of a case's rows."""
    host = rows.cu_q_host, rows.kv_lens_host
    return operation.plan(rows.page_table, rows.cu_q, rows.kv_lens, *host, **options)


# ---- what it refuses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "shape", "why"),
    [
        ("sm_90", shape_of(32, 8, 72), "a head size of 72 is no multiple of 16 up to 256"),
        ("sm_90", shape_of(32, 8, 512), "a head size of 512"),
        ("gfx942", shape_of(32, 8, 128, 20), "pages of 20 tokens are no multiple of 16 up to 128"),
        ("sm_100", shape_of(32, 8, 128, 256), "pages of 256 tokens"),
        ("sm_90", shape_of(30, 8, 128), "30 query heads are no multiple of 8 KV heads"),
        ("sm_80", shape_of(32, 8, 128, kv_dtype=torch.float8_e4m3fn), "sm_80 has no 8-bit floats"),
        ("gfx942", shape_of(32, 8, 128, kv_dtype=torch.float8_e4m3fn), "gfx942 has torch.float8_e4m3fnuz"),
        ("sm_90", shape_of(32, 8, 128, kv_dtype=torch.float16), "KV of torch.float16 with queries of torch.bfloat16"),
        ("sm_90", replace(LLAMA, kv_strides=(1_000_004, 65536, 8192, 128)), "not multiples of 16 bytes"),
    ],
)
def test_a_reader_of_the_refusal_knows_what_to_change(target, shape, why):
    with pytest.raises(Unsupported, match=why):
        choices(FAMILY, named(target), shape, {"attention": "triton"})


@pytest.mark.parametrize("target", [name for name in NAMED if name != "cpu"])
def test_llama_runs_on_every_gpu(target):
    assert choices(FAMILY, named(target), LLAMA)[0].implementation == "triton"


@pytest.mark.parametrize(
    ("target", "shape", "why"),
    [
        ("gfx950", LLAMA, "FlashInfer is for NVIDIA devices"),
        ("sm_90", shape_of(32, 32, 96), "head sizes are 64, 128, 256, not 96"),
        ("sm_90", shape_of(32, 8, 128, sinks=True), "sinks"),
        ("sm_90", shape_of(32, 8, 128, tree=True), "tree"),
        ("sm_90", shape_of(32, 8, 128, kv_dtype=torch.int8), "bfloat16 and float16 alone"),
        ("sm_90", LLAMA, "flashinfer is not installed"),
    ],
)
def test_flashinfer_is_taken_only_by_name_and_says_what_it_lacks(target, shape, why, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choices(FAMILY, named(target), shape)[0].implementation == "triton"
    with pytest.raises(Unsupported, match=why):
        choices(FAMILY, named(target), shape, {"attention": "flashinfer"})


def test_a_cpu_runs_the_reference():
    assert choices(FAMILY, named("cpu"), LLAMA)[0].implementation == "torch"


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("q", lambda q: q[:, :3], "q has shape"),
        ("q", lambda q: q.half(), "q is torch.float16, expected torch.float32"),
        ("q", lambda q: q.transpose(0, 1).contiguous().transpose(0, 1), "heads must follow each other"),
        ("q", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q is not contiguous in its last axis"),
        ("kv", lambda kv: kv.contiguous(), "the kernel is made for"),
        ("kv", lambda kv: kv.bfloat16(), "kv is torch.bfloat16"),
        ("kv_scales", lambda _: torch.ones(2), "needs kv_scales with 0 axes"),
        ("tree", lambda _: torch.ones(3, dtype=torch.int64), "a tree mask is needed exactly where the shape has one"),
        ("lse", lambda lse: lse.double(), "lse is torch.float64"),
        ("lse", lambda lse: torch.empty(4, 3).t(), "lse"),
        ("out", lambda out: out[:2], "out has shape"),
    ],
)
def test_a_tensor_that_the_kernel_must_not_touch_is_named(name, spoil, why):
    arguments = call(SMALL, (1, 20), (2, 5))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(InputError, match=why):
        triton(SMALL)(**arguments)


@pytest.mark.parametrize(
    ("cu_q", "kv_lens", "why"),
    [
        ((0, 3), (2,), "row 0 has 3 queries but 2 tokens"),
        ((0, 1), (17,), "row 0: 17 tokens do not fit in 1 pages"),
        ((0, 2, 1), (5, 5), r"row 1 has -1 queries"),
    ],
)
def test_lengths_that_cannot_be_are_refused(cu_q, kv_lens, why):
    table = torch.zeros(len(kv_lens), 1, dtype=torch.int32)
    with pytest.raises(InputError, match=why):
        triton(SMALL).plan(table, torch.tensor(cu_q), torch.tensor(kv_lens), cu_q, kv_lens)


def test_a_window_narrower_than_a_tree_is_refused():
    rows = call(replace(SMALL, tree=True), (3, 20))["plan"]
    with pytest.raises(InputError, match="64 are the least"):
        planned(triton(replace(SMALL, tree=True)), rows, window=63)


def test_a_step_larger_than_its_capacity_is_refused():
    rows = call(SMALL, (1, 20), (1, 5))["plan"]
    with pytest.raises(InputError, match="2 rows of 2 tokens in a plan for"):
        planned(triton(SMALL), rows, capacity=Capacity(rows=1, tokens=4, row_tokens=1, kv_tokens=64))


# ---- plans ----------------------------------------------------------------------------------------------------------
DECODE = Capacity(rows=4, tokens=4, row_tokens=1, kv_tokens=512)


def test_grids_of_a_capacity_do_not_depend_on_the_step():
    operation = triton(SMALL)
    grids = []
    for rows in ([(1, 20)], [(1, 400), (1, 1), (0, 3), (1, 500)]):
        plan = planned(operation, call(SMALL, *rows)["plan"], capacity=DECODE)
        grids.append(
            [(one.name, one.units.shape, one.reductions.shape, one.partial_out.shape) for one in plan.launches]
        )
    assert grids[0] == grids[1]


def test_a_plan_uploads_once():
    uploads = []
    rows = call(SMALL, (1, 300), (30, 40), (2, 9))["plan"]
    planned(triton(SMALL), rows, upload=lambda array: uploads.append(array) or torch.from_numpy(array))
    assert len(uploads) == 1


def test_rows_of_many_heads_take_the_larger_tile():
    names = lambda shape, *rows: [one.name for one in planned(triton(shape), call(shape, *rows)["plan"]).launches]  # noqa: E731
    assert names(SMALL, (1, 20)) == ["decode"]
    assert names(SMALL, (8, 20)) == ["decode"]
    assert names(SMALL, (9, 20), (1, 3)) == ["verify"]
    assert names(SMALL, (1, 20), (17, 20)) == ["verify", "extend"]
    assert names(shape_of(64, 2, 64, 16), (1, 20)) == ["verify"]


class TestInterpreted:
    pytestmark = interpreted

    def test_the_same_array_in_a_captured_plan_gives_the_new_step(self):
        """A graph keeps plan and grid; only the contents of buffers change."""
        operation, held = triton(SMALL), {}

        def upload(array):
            if held:
                held["array"].copy_(torch.from_numpy(array))
            else:
                held["array"] = torch.from_numpy(array.copy())
            return held["array"]

        first, second = call(SMALL, (1, 20), (1, 500)), call(SMALL, (1, 480), (1, 3), (1, 400), seed=1)
        captured = planned(operation, first["plan"], upload=upload, capacity=DECODE)
        planned(operation, second["plan"], upload=upload, capacity=DECODE)
        replayed = second | {"plan": replace(captured, page_table=second["plan"].page_table), "lse": None}
        expected = TorchAttention(SMALL)(**(second | {"out": None, "lse": None}))
        torch.testing.assert_close(operation(**replayed), expected, rtol=1e-4, atol=1e-5)

    def test_with_a_fixed_split_a_row_has_the_same_bits_in_any_company(self):
        operation = triton(SMALL)
        arguments = call(SMALL, (1, 300), (1, 40), (2, 350))
        together = operation(**(arguments | {"plan": planned(operation, arguments["plan"], fixed_split_tokens=128)}))
        rows = arguments["plan"]
        alone = replace(rows, page_table=rows.page_table[2:], cu_q_host=(0, 2), kv_lens_host=(350,))
        plan = planned(operation, alone, fixed_split_tokens=128)
        one = operation(**(arguments | {"plan": plan, "q": arguments["q"][2:], "out": None, "lse": None}))
        assert torch.equal(one, together[2:])

    def test_tokens_outside_every_row_are_left_alone(self):
        arguments = call(SMALL, (1, 20), (3, 5))
        rows = replace(
            arguments["plan"], page_table=arguments["plan"].page_table[:1], cu_q_host=(0, 1), kv_lens_host=(20,)
        )
        arguments["out"].fill_(7.0)
        triton(SMALL)(**(arguments | {"plan": rows}))
        assert (arguments["out"][1:] == 7.0).all()
        assert (arguments["out"][0] != 7.0).any()

    @pytest.mark.parametrize("target", ["sm_100", "gfx942", "gfx950"])
    def test_the_tiles_of_other_devices_agree(self, target):
        shape, batch = shape_of(4, 2, 64, 32, dtype=torch.float16), Batch(rows=((1, 40), (20, 50), (3, 300)))
        case = Case(name="", shape=shape, make=lambda *where: make(shape, batch, *where), traffic=None)
        run_case(FAMILY, case, named(target), HERE, force={"attention": "triton"})


# ---- states ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sinks", [False, True])
def test_two_states_of_a_row_merge_into_the_whole(sinks):
    """The first 32 tokens as a shared prefix, the rest as a suffix; the sink belongs to one of them."""
    shape = replace(SMALL, sinks=sinks)
    arguments = call(shape, (1, 75), seed=3)
    rows, scores = arguments["plan"], arguments["scores"]
    whole = TorchAttention(shape)(**arguments)
    attend = TorchAttention(replace(shape, sinks=False))
    prefix = replace(rows, page_table=rows.page_table[:, :2], kv_lens_host=(32,))
    suffix = replace(rows, page_table=rows.page_table[:, 2:], kv_lens_host=(43,))
    states = []
    for part, own in ((prefix, scores), (suffix, replace(scores, sinks=None))):
        lse = torch.empty_like(arguments["lse"])
        states += [attend(**(arguments | {"plan": part, "scores": own, "lse": lse, "out": None})), lse]
    lse = torch.empty_like(arguments["lse"])
    torch.testing.assert_close(TorchMerge()(*states, lse=lse), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, arguments["lse"], rtol=1e-5, atol=1e-5)


def test_a_state_that_saw_nothing_changes_nothing():
    out, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing, never = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    merged = torch.empty_like(lse)
    torch.testing.assert_close(TorchMerge()(nothing, never, out, lse, lse=merged), out)
    torch.testing.assert_close(merged, lse)
    assert (TorchMerge()(nothing, never, nothing, never, lse=merged) == 0).all()
    assert (merged == float("-inf")).all()


def test_scores_of_another_layer_are_a_defect():
    arguments = call(SMALL, (1, 20))
    operation = triton(SMALL)
    arguments["plan"] = planned(operation, arguments["plan"], window=None)
    with pytest.raises(AssertionError, match="planned for another window"):
        operation(**(arguments | {"scores": Scores(scale=1.0, window=5)}))
