"""Planner of attention work: every query meets every token it sees exactly once, whatever the lengths; grids fit."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_kernels.attention.work import DIRECT, RECORD, Capacity, Split, Tiling, pack, plan_work

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3000)), max_size=8)  # (queries, tokens before them)
TILINGS = st.builds(
    Tiling,
    group=st.sampled_from([1, 3, 4, 16, 24]),
    kv_heads=st.sampled_from([1, 2, 8]),
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([16, 64, 128]),
)
SPLITS = st.builds(
    Split,
    programs=st.sampled_from([0, 1, 132, 396]),
    smallest=st.sampled_from([64, 256]),
    level=st.booleans(),
    fixed=st.sampled_from([0, 0, 100, 512]),
)


def plan(rows, tiling, split, **options):
    queries = np.array([n for n, _ in rows], np.int64)
    kv = queries + np.array([before for _, before in rows], np.int64)
    return plan_work(np.cumsum(queries) - queries, queries, kv, tiling, split, **options)


def by_tile(work):
    """(row, first packed query) -> its units' (begin, end, slot), in order."""
    tiles = defaultdict(list)
    for row, _, _, _, first_m, begin, end, slot in work.units.tolist():
        tiles[row, first_m].append((begin, end, slot))
    return {key: sorted(units) for key, units in tiles.items()}


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, tiling=TILINGS, split=SPLITS, window=st.none() | st.integers(1, 500), tree=st.booleans())
def test_every_query_meets_what_it_sees_exactly_once(rows, tiling, split, window, tree):
    tiles = by_tile(plan(rows, tiling, split, window=window, tree=tree))
    expected = {(row, first) for row, (n, _) in enumerate(rows) for first in range(0, n * tiling.group, tiling.block_m)}
    assert tiles.keys() == expected
    for (row, first_m), units in tiles.items():
        queries, before = rows[row]
        first = 0 if tree else first_m // tiling.group
        last = min((first_m + tiling.block_m - 1) // tiling.group, queries - 1)
        seen_from = 0 if window is None else max(0, before + first - window + 1)
        assert seen_from - tiling.block_n < units[0][0] <= seen_from
        assert units[-1][1] == before + last + 1
        assert all(begin < end and begin % tiling.block_n == 0 for begin, end, _ in units)
        assert all(one[1] == two[0] for one, two in pairwise(units)), "a gap, or an overlap"


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, tiling=TILINGS, split=SPLITS)
def test_slots_of_a_split_tile_follow_each_other_and_are_reduced(rows, tiling, split):
    work = plan(rows, tiling, split)
    queries = [n for n, _ in rows]
    owner = {(sum(queries[:row]), count): row for row, count in enumerate(queries)}
    reduced = {
        (owner[query, count], first_m): list(range(first_slot, first_slot + pieces))
        for first_slot, pieces, query, count, first_m, *_ in work.reductions.tolist()
    }
    for key, units in by_tile(work).items():
        slots = [slot for _, _, slot in units]
        assert slots == (reduced[key] if len(units) > 1 else [DIRECT])
    assert sorted(slot for slots in reduced.values() for slot in slots) == list(range(work.slots))


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, tiling=TILINGS, split=SPLITS, spare=st.integers(0, 3))
def test_no_step_needs_more_than_its_capacity(rows, tiling, split, spare):
    capacity = Capacity(
        rows=len(rows) + spare,
        tokens=sum(n for n, _ in rows) + spare,
        row_tokens=max((n for n, _ in rows), default=0) + spare,
        kv_tokens=max((n + before for n, before in rows), default=0),
    )
    work = plan(rows, tiling, split)
    assert len(work.units) <= capacity.units(tiling, split)
    assert work.slots <= capacity.units(tiling, split)
    assert len(work.reductions) <= capacity.tiles(tiling)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, tiling=TILINGS, split=st.builds(Split, programs=st.sampled_from([1, 132, 396])))
def test_no_unit_is_longer_than_its_share(rows, tiling, split):
    units = plan(rows, tiling, split).units
    lengths = units[:, 6] - units[:, 5]
    share = max(split.smallest, int(lengths.sum()) * tiling.kv_heads / split.programs)
    assert (lengths <= share + 2 * tiling.block_n).all()
    assert (np.diff(lengths) <= 0).all(), "the longest come first"


LLAMA = Tiling(group=4, kv_heads=8, block_m=16, block_n=64)


@pytest.mark.parametrize("batch", [1, 2, 8, 12, 33, 64, 200])
def test_decode_fills_the_device_at_any_batch(batch):
    units = plan([(1, 65535)] * batch, LLAMA, Split(programs=396)).units
    assert 396 * 0.6 <= len(units) * LLAMA.kv_heads <= max(2.5 * 396, batch * LLAMA.kv_heads)


def test_a_long_row_among_short_ones_is_what_is_split():
    work = plan([(1, 99999)] + [(1, 199)] * 60, LLAMA, Split(programs=396))
    pieces = {row: len(units) for (row, _), units in by_tile(work).items()}
    assert pieces.pop(0) > 20
    assert set(pieces.values()) == {1}


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 3000)), min_size=1, max_size=6), tiling=TILINGS)
def test_with_a_fixed_split_a_row_is_cut_alike_in_any_company(rows, tiling):
    split = Split(programs=396, fixed=300)
    together = by_tile(plan(rows, tiling, split))
    for index, row in enumerate(rows):
        alone = by_tile(plan([row], tiling, split))
        for (_, first_m), units in alone.items():
            assert [unit[:2] for unit in units] == [unit[:2] for unit in together[index, first_m]]


def test_prefill_is_split_only_when_tiles_leave_the_device_idle():
    tiling = Tiling(group=4, kv_heads=8, block_m=128, block_n=64)
    split = Split(programs=132, level=False)
    assert plan([(8192, 0)], tiling, split).slots == 0
    assert plan([(64, 16384)], tiling, split).slots > 0


def test_packed_sections_carry_their_count_and_leave_room():
    work = plan([(1, 700), (1, 5)], LLAMA, Split(programs=396))
    buffer, (units, reductions) = pack([(work.units, 9), (work.reductions, len(work.reductions))])
    assert buffer.dtype == np.int32
    assert len(buffer) == (9 + 1 + len(work.reductions) + 1) * RECORD
    assert buffer[units][0] == len(work.units)
    np.testing.assert_array_equal(buffer[units][RECORD : RECORD * (1 + len(work.units))], work.units.reshape(-1))
    np.testing.assert_array_equal(buffer[reductions][RECORD:], work.reductions.reshape(-1))
    assert not buffer[units][RECORD * (1 + len(work.units)) :].any()
