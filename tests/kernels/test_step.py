"""Step preparation: the buffers of a step follow from the request table, row by row; padding harms nobody."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_kernels.capabilities import CPU, named
from baton_kernels.oracle import Unsupported, choices
from baton_kernels.rt.program import InputError
from baton_kernels.step import FAMILY, StepShape, TorchStep, TritonStep, step_buffers

PAGE = 16
DUMMY = 999
HERE = torch.device("cpu")
CONFIG = {"BLOCK": 128, "num_warps": 1, "num_stages": 1}


def request_table(rows=6, columns=8):
    """Page 100 * row + column, last token 7000 + row: every number tells where it came from."""
    table = torch.arange(rows, dtype=torch.int32)[:, None] * 100 + torch.arange(columns, dtype=torch.int32)
    return table, 7000 + torch.arange(rows)


def work_of(*rows):
    """(row, start, count, offset) of each batch row."""
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.contiguous()


def prepare(work, prompt_ids=(), *, tokens, columns=4, table=None):
    table, last = request_table() if table is None else table
    buffers = step_buffers(work.shape[1], tokens, columns, HERE)
    for buffer in buffers.values():
        buffer.fill_(-5)
    TorchStep(StepShape(page_tokens=PAGE))(
        table, last, work, torch.tensor(prompt_ids, dtype=torch.int64), DUMMY, **buffers
    )
    return {name: buffer.tolist() for name, buffer in buffers.items()}


def test_a_decoding_row_continues_with_the_token_that_it_sampled_last():
    got = prepare(work_of((3, 17, 1, -1), (1, 31, 1, -1)), tokens=2)
    assert got["input_ids"] == [7003, 7001]
    assert got["positions"] == [17, 31]
    assert got["write_pages"] == [301, 101]
    assert got["write_offsets"] == [1, 15]
    assert got["cu_q"] == [0, 1, 2]
    assert got["kv_lens"] == [18, 32]
    assert got["page_table"] == [[300, 301, DUMMY, DUMMY], [100, 101, DUMMY, DUMMY]]


def test_prompt_ids_are_taken_from_where_the_row_says():
    got = prepare(work_of((2, 15, 3, 4), (0, 0, 2, 0)), prompt_ids=[1, 2, 3, 4, 5, 6, 7], tokens=5)
    assert got["input_ids"] == [5, 6, 7, 1, 2]
    assert got["positions"] == [15, 16, 17, 0, 1]
    assert got["write_pages"] == [200, 201, 201, 0, 0]
    assert got["write_offsets"] == [15, 0, 1, 0, 1]


def test_padding_writes_to_the_dummy_page_and_owns_no_token():
    got = prepare(work_of((-1, -1, -1, -1), (4, 0, 1, -1), (-1, 9, 9, 0)), tokens=3)
    assert got["input_ids"] == [7004, 0, 0]
    assert got["positions"] == [0, 0, 0]
    assert got["write_pages"] == [400, DUMMY, DUMMY]
    assert got["write_offsets"] == [0, 0, 0]
    assert got["cu_q"] == [0, 0, 1, 1]
    assert got["kv_lens"] == [0, 1, 0]
    assert got["page_table"] == [[DUMMY] * 4, [400, DUMMY, DUMMY, DUMMY], [DUMMY] * 4]


def test_pages_behind_a_rows_last_token_are_never_handed_out():
    """The request table keeps pages of an earlier request; nobody may follow them."""
    got = prepare(work_of((5, 31, 1, -1), (2, 32, 1, -1)), tokens=2, columns=8)
    assert got["page_table"][0] == [500, 501] + [DUMMY] * 6
    assert got["page_table"][1] == [200, 201, 202] + [DUMMY] * 5


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.booleans()), max_size=6),
    spare=st.integers(0, 5),
    order=st.permutations(range(6)),
)
def test_any_batch_equals_the_walk_over_its_tokens(batch, spare, order):
    table, last = request_table()
    rows, ids, walked, lengths = [], [], [], []
    for owner, (start, count, given_ids) in zip(order, batch, strict=False):
        given_ids = given_ids or count > 1
        rows.append((owner, start, count, len(ids) if given_ids else -1))
        mine = [10_000 + len(ids) + i for i in range(count)] if given_ids else [7000 + owner] * count
        ids += mine if given_ids else []
        walked += [
            (token, start + i, owner * 100 + (start + i) // PAGE, (start + i) % PAGE) for i, token in enumerate(mine)
        ]
        lengths.append(start + count)
    got = prepare(work_of(*rows), ids, tokens=len(walked) + spare, columns=8, table=(table, last))
    names = ("input_ids", "positions", "write_pages", "write_offsets")
    assert list(zip(*(got[name] for name in names), strict=True)) == walked + [(0, 0, DUMMY, 0)] * spare
    assert got["cu_q"] == list(accumulate((count for _, _, count, _ in rows), initial=0))
    assert got["kv_lens"] == lengths


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_every_gpu_runs_the_kernel(device):
    assert choices(FAMILY, named(device), StepShape(page_tokens=64))[0].implementation == "triton"


def test_a_cpu_runs_the_reference():
    assert [one.implementation for one in choices(FAMILY, CPU, StepShape(page_tokens=64))] == ["torch"]


def test_a_page_without_tokens_is_refused():
    with pytest.raises(Unsupported, match="a page cannot hold 0 tokens"):
        choices(FAMILY, named("sm_90"), StepShape(page_tokens=0), {"step": "triton"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"work": torch.zeros(3, 2, dtype=torch.int64)}, r"work has shape \[3, 2\], expected \[4, any\]"),
        ({"work": torch.zeros(2, 4, dtype=torch.int64).T}, "work is not contiguous in its last axis"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions has shape \[4\], expected \[3\]"),
        ({"cu_q": torch.zeros(2, dtype=torch.int32)}, r"cu_q has shape \[2\], expected \[3\]"),
        ({"last_token": torch.zeros(5, dtype=torch.int64)}, r"last_token has shape \[5\], expected \[6\]"),
        ({"kv_lens": torch.zeros(2, dtype=torch.int64)}, "kv_lens is torch.int64, expected torch.int32"),
        ({"write_pages": torch.zeros(3, dtype=torch.int32)}, "write_pages is torch.int32, expected torch.int64"),
    ],
)
def test_a_wrong_tensor_is_named(change, message):
    table, last = request_table()
    arguments = {
        "table": table,
        "last_token": last,
        "work": work_of((0, 0, 1, -1), (1, 0, 1, -1)),
        "prompt_ids": torch.zeros(0, dtype=torch.int64),
        "dummy_page": DUMMY,
    } | step_buffers(2, 3, 4, HERE)
    with pytest.raises(InputError, match=message):
        TritonStep(named("sm_90"), StepShape(page_tokens=PAGE), CONFIG)(**arguments | change)
