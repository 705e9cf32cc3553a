"""Which blocks travel: every (layer, head, position) exactly once, in chunks that fit."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton_kvtransfer import PageLayout
from baton_kvtransfer.plan import Block, Coverage, PageRun, Pending, cell_bytes, page_runs

LAYOUT = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=16, dtype="bfloat16")  # 128 bytes per layer, position


def pending(slot_bytes: int, first_token: int, end_token: int, layout: PageLayout = LAYOUT) -> Pending:
    return Pending(layout=layout, slot_bytes=slot_bytes, first_token=first_token, end_token=end_token)


def take_all(source: Pending) -> list[Block]:
    return list(iter(source.take, None))


@given(data=st.data(), heads=st.integers(1, 5), page_tokens=st.sampled_from([1, 4, 16]), layers=st.integers(1, 6))
@settings(max_examples=120, deadline=None)
def test_every_cell_travels_exactly_once(data: st.DataObject, heads: int, page_tokens: int, layers: int) -> None:
    layout = PageLayout(layers=layers, kv=2, heads=heads, page_tokens=page_tokens, dim=4, dtype="float16")
    first = data.draw(st.integers(0, 20))
    end = first + data.draw(st.integers(0, 40))
    slot_bytes = data.draw(st.integers(cell_bytes(layout), 900))
    source = pending(slot_bytes, first, end, layout)
    coverage = Coverage(layout=layout, first_token=first, end_token=end)
    cells: set[tuple[int, int, int]] = set()
    blocks: list[Block] = []
    begin = 0
    while begin < end:
        stop = min(end, begin + data.draw(st.integers(1, 30)))
        layer = 0
        while layer < layers:
            until = min(layers, layer + data.draw(st.integers(1, 3)))
            source.add(layer, until, begin, stop)
            layer = until
            if data.draw(st.booleans()):
                blocks += take_all(source)
        begin = stop
    assert source.complete
    blocks += take_all(source)
    assert source.empty
    for block in blocks:
        assert 0 < block.bytes(layout) <= slot_bytes
        assert coverage.refuses(block) == ""
        coverage.add(block)
        new = {
            (layer, head, position)
            for layer in range(block.layer_begin, block.layer_end)
            for head in range(block.head_begin, block.head_end)
            for position in range(block.token_begin, block.token_end)
        }
        assert not new & cells
        cells |= new
        runs = list(page_runs(block, page_tokens))
        assert sum(run.count for run in runs) == block.tokens
        assert all(run.offset + run.count <= page_tokens for run in runs)
    assert len(cells) == layers * heads * (end - first)
    assert coverage.complete


def test_layers_melt_into_chunks_that_fill_a_slot() -> None:
    source = pending(4096, 0, 16)  # one layer is 2048 bytes
    source.add(0, 1, 0, 16)
    assert source.take() is None  # half a slot: more will come
    source.add(1, 2, 0, 16)
    block = source.take()
    assert block is not None
    assert (block.layer_begin, block.layer_end) == (0, 2)


def test_nothing_waits_once_everything_was_announced() -> None:
    source = pending(1 << 20, 0, 16)
    source.add(0, 4, 0, 16)
    assert source.take() is not None
    assert source.empty


def test_long_runs_are_cut_at_page_borders() -> None:
    source = pending(4096, 5, 60)  # 32 positions fit
    source.add(0, 1, 0, 60)
    blocks = take_all(source)
    assert [(block.token_begin, block.token_end) for block in blocks] == [(5, 32), (32, 60)]


def test_announcements_outside_the_range_or_made_before_are_ignored() -> None:
    source = pending(4096, 16, 32)
    for _ in range(2):
        source.add(0, 4, 0, 64)
    assert source.complete
    assert sum(block.bytes(LAYOUT) for block in take_all(source)) == 16 * LAYOUT.token_bytes


def test_a_gap_is_an_error_that_names_it() -> None:
    source = pending(4096, 0, 64)
    with pytest.raises(ValueError, match=r"layer 2: positions \[0, 16\) were not announced"):
        source.add(2, 3, 16, 32)


def test_a_slot_smaller_than_one_position_of_one_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="raise slot_bytes"):
        pending(63, 0, 64)


def test_a_position_run_is_split_at_the_pages_of_its_owner() -> None:
    block = Block(layer_begin=0, layer_end=1, head_begin=0, head_end=1, token_begin=14, token_end=35)
    assert list(page_runs(block, 16)) == [PageRun(0, 14, 0, 2), PageRun(1, 0, 2, 16), PageRun(2, 0, 18, 3)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer_end": 5}, "layers"),
        ({"head_end": 3}, "heads"),
        ({"token_end": 33}, "positions"),
        ({"token_begin": 3}, "positions"),
        ({"layer_end": 0}, "layers"),
    ],
)
def test_a_block_outside_the_transfer_is_refused(change: dict[str, int], why: str) -> None:
    coverage = Coverage(layout=LAYOUT, first_token=4, end_token=32)
    sizes = {"layer_begin": 0, "layer_end": 4, "head_begin": 0, "head_end": 2, "token_begin": 4, "token_end": 32}
    assert coverage.refuses(Block(**sizes)) == ""
    assert coverage.refuses(Block(**(sizes | change))).startswith(why)


def test_overlapping_blocks_are_refused() -> None:
    coverage = Coverage(layout=LAYOUT, first_token=0, end_token=32)
    sizes = {"layer_begin": 1, "layer_end": 2, "token_begin": 4, "token_end": 20}
    coverage.add(Block(head_begin=0, head_end=1, **sizes))
    assert "arrived before" in coverage.refuses(
        Block(head_begin=0, head_end=1, **(sizes | {"token_begin": 19, "token_end": 22}))
    )
    assert "overlap" in coverage.refuses(Block(head_begin=0, head_end=2, **sizes))
    assert coverage.refuses(Block(head_begin=1, head_end=2, **sizes)) == ""
