"""Who computes what in a paged attention: a pure planner from the lengths of a step to a list of work units.

Query heads that share a KV head are packed with a row's query tokens: packed query m is head m % group of token
m // group. `block_m` packed queries of one row are a *tile*; a *unit* is a tile and a range of KV tokens, computed by
one program for each KV head. A tile cut into several units has *partial states*, in consecutive slots, and one
*reduction*. Every (query token, KV token it sees) belongs to exactly one unit; no unit is empty.
The count of units never exceeds `Capacity`, which depends on static sizes alone: a captured grid fits all later steps,
and programs beyond the count, which is in the uploaded buffer, leave at once.
It knows neither tensors nor page tables nor devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECORD = 8
"""int32 of one record. Unit: row, first query token of the row in the batch, query tokens of the row, KV tokens of the
row, first packed query of the tile, KV begin, KV end, slot (-1: write the output itself). Reduction: first slot, slots,
first query token, query tokens, first packed query, 0, 0, 0."""
DIRECT = -1
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Tiles of one kernel."""

    group: int  # query heads of one KV head
    kv_heads: int
    block_m: int  # packed queries
    block_n: int  # KV tokens of one step; units begin at multiples of it

    def tiles(self, tokens: int) -> int:
        """Of a row with that many query tokens."""
        return -(-tokens * self.group // self.block_m)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """When and how finely the KV of a tile is cut."""

    programs: int  # about how many shall run in all, over the KV heads; 0: nothing is cut
    smallest: int = 256  # KV tokens that are worth a program
    level: bool = True  # cut what is longer than its share; False: only if tiles alone leave programs idle
    fixed: int = 0  # KV tokens: cut by a row's own length alone, whatever else is in the batch, so that results repeat

    def chunk(self, lengths: Int64, tiling: Tiling) -> int:
        """KV tokens above which a tile is cut; 0: none is."""
        if self.fixed:
            return -(-self.fixed // tiling.block_n) * tiling.block_n
        share = self.share(tiling)
        if share == 0 or (not self.level and len(lengths) >= share):
            return 0
        wanted = max(self.smallest, -(-int(lengths.sum()) // share))
        return -(-wanted // tiling.block_n) * tiling.block_n

    def share(self, tiling: Tiling) -> int:
        """Units wanted for each KV head."""
        return -(-self.programs // tiling.kv_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Largest step that a static buffer and grid must fit."""

    rows: int
    tokens: int  # query tokens of all rows together
    row_tokens: int  # query tokens of one row
    kv_tokens: int  # KV tokens of one row; matters for `Split.fixed` alone

    def tiles(self, tiling: Tiling) -> int:
        """At most so many tiles."""
        by_row = self.rows * tiling.tiles(min(self.row_tokens, self.tokens))
        return min(by_row, self.tokens * tiling.group // tiling.block_m + self.rows)

    def units(self, tiling: Tiling, split: Split) -> int:
        """At most so many units; partial states need no more slots, and reductions no more than `tiles`."""
        tiles = self.tiles(tiling)
        if split.fixed:
            return tiles * max(1, -(-self.kv_tokens // split.chunk(np.zeros(0, np.int64), tiling)))
        return tiles + split.share(tiling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One launch, and the launch that reduces its partial states."""

    units: Int32  # [units, RECORD], longest first
    reductions: Int32  # [reductions, RECORD]
    slots: int  # partial states of one KV head


def plan_work(
    cu_q: Int64,
    queries: Int64,
    kv_lens: Int64,
    tiling: Tiling,
    split: Split,
    *,
    window: int | None = None,
    tree: bool = False,
) -> Work:
    """Row b owns query tokens [cu_q[b], cu_q[b] + queries[b]), the last ones of its kv_lens[b] tokens; a row with 0
    queries costs nothing. With `window` a token sees itself and the window - 1 before it; in a `tree` its depth counts,
    not its place.
    """
    tiles = -(-queries * tiling.group // tiling.block_m)
    row = np.repeat(np.arange(len(queries)), tiles)
    first_m = (np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tiling.block_m
    start = (kv_lens - queries)[row]
    last_token = np.minimum((first_m + tiling.block_m - 1) // tiling.group, queries[row] - 1)
    end = start + last_token + 1
    begin = np.zeros_like(end)
    if window is not None:
        first_token = 0 if tree else first_m // tiling.group
        begin = np.maximum(start + first_token - window + 1, 0) // tiling.block_n * tiling.block_n
    length = end - begin
    chunk = split.chunk(length, tiling)
    blocks = -(-length // tiling.block_n)
    pieces = -(-length // chunk) if chunk else np.ones_like(length)
    step = -(-blocks // np.maximum(pieces, 1)) * tiling.block_n  # even pieces: the last is not a remainder
    pieces = -(-length // step)
    tile = np.repeat(np.arange(len(row)), pieces)
    piece = np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = pieces > 1
    slots = np.where(cut, pieces, 0)
    first_slot = np.cumsum(slots) - slots
    units = np.zeros((len(tile), RECORD), np.int32)
    units[:, 0] = row[tile]
    units[:, 1] = cu_q[row[tile]]
    units[:, 2] = queries[row[tile]]
    units[:, 3] = kv_lens[row[tile]]
    units[:, 4] = first_m[tile]
    units[:, 5] = begin[tile] + piece * step[tile]
    units[:, 6] = np.minimum(units[:, 5] + step[tile], end[tile])
    units[:, 7] = np.where(cut[tile], first_slot[tile] + piece, DIRECT)
    reductions = np.zeros((int(cut.sum()), RECORD), np.int32)
    reductions[:, 0] = first_slot[cut]
    reductions[:, 1] = pieces[cut]
    reductions[:, 2] = cu_q[row[cut]]
    reductions[:, 3] = queries[row[cut]]
    reductions[:, 4] = first_m[cut]
    order = np.argsort(units[:, 5] - units[:, 6], kind="stable")
    return Work(units=units[order], reductions=reductions, slots=int(slots.sum()))


def pack(sections: Sequence[tuple[Int32, int]]) -> tuple[Int32, list[slice]]:
    """(records, room for so many) of each section -> one buffer to upload, and where each section lies in it.

    A section begins with a record that holds the count of those which follow.
    """
    ends = np.cumsum([(room + 1) * RECORD for _, room in sections]).tolist()
    buffer = np.zeros(ends[-1] if ends else 0, np.int32)
    places = [slice(end - (room + 1) * RECORD, end) for end, (_, room) in zip(ends, sections, strict=True)]
    for place, (records, room) in zip(places, sections, strict=True):
        assert len(records) <= room, f"{len(records)} records, room for {room}"
        buffer[place.start] = len(records)
        buffer[place.start + RECORD : place.start + RECORD * (1 + len(records))] = records.reshape(-1)
    return buffer, places
