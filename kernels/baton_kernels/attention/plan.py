"""Plans one step of paged attention: which program computes which rows, and every buffer that its launches use.

Rows with few query tokens (decode, verification of drafts) share one launch, with tiles no larger than they need and
their KV split over the device; longer rows (prefill, chunks behind a cached prefix) have another. A plan is made once
per step, outside of graphs, and serves all layers of one window. It does not know kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels.attention.shape import TREE_TOKENS, AttentionShape, Upload, upload_to
from baton_kernels.attention.work import Capacity, Int32, Int64, Split, Tiling, pack, plan_work
from baton_kernels.rt.check import check
from baton_kernels.rt.program import InputError

SHORT_ROW = 16
"""Query tokens up to which a row's KV is split whatever else runs."""
SMALL_TILE, MEDIUM_TILE = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one program cuts its rows."""

    tiling: Tiling
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One program's part of a step."""

    name: str  # of the program: decode, verify, extend
    units: Tensor  # int32: a section of `work.pack`
    reductions: Tensor | None  # the same; None: nothing is split
    partial_out: Tensor  # float32[slots, kv_heads, block_m, dim]
    partial_lse: Tensor  # float32[slots, kv_heads, block_m]
    row_tokens: int  # no row has more query tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """One step's work, on the device. Who captures a launch in a graph keeps its plan."""

    page_table: Tensor  # int32[B, P]
    window: int | None
    launches: tuple[Launch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One launch before it is on the device."""

    name: str
    units: tuple[Int32, int]  # records, and room for so many
    reductions: tuple[Int32, int]
    slots: int
    row_tokens: int


class StepPlanner:
    """Makes plans for one shape. Owns the workspace of partial states, which plans that follow each other share."""

    def __init__(self, shape: AttentionShape, tiles: Mapping[str, Tile]) -> None:
        self._shape = shape
        self._tiles = tiles
        self._workspace = torch.empty(0)

    def plan(
        self,
        page_table: Tensor,
        cu_q: Sequence[int],
        kv_lens: Sequence[int],
        *,
        window: int | None,
        upload: Upload | None,
        capacity: Capacity | None,
        fixed_split_tokens: int,
    ) -> PagedPlan:
        """See `paged.TritonAttention.plan`."""
        first, kv = np.array(cu_q, np.int64), np.array(kv_lens, np.int64)
        queries = np.diff(first)
        self._check(page_table, queries, kv, window)
        if capacity is not None and (
            len(kv) > capacity.rows or first[-1] > capacity.tokens or queries.max(initial=0) > capacity.row_tokens
        ):
            raise InputError(f"{len(kv)} rows of {first[-1]} tokens in a plan for {capacity}")
        parts = list(self._parts(first[:-1], queries, kv, window, capacity, fixed_split_tokens))
        sections = [section for part in parts for section in (part.units, part.reductions)]
        buffer, places = pack(sections)
        device = page_table.device
        uploaded = (upload or upload_to(device))(buffer)
        widths = [self._shape.kv_heads * self._tiles[part.name].tiling.block_m for part in parts]
        states = max((part.slots * width for part, width in zip(parts, widths, strict=True)), default=0)
        if self._workspace.numel() < states * (self._shape.dim + 1) or self._workspace.device != device:
            self._workspace = torch.empty(states * (self._shape.dim + 1), device=device)
        launches = [
            self._launch(part, uploaded[places[2 * index]], uploaded[places[2 * index + 1]])
            for index, part in enumerate(parts)
        ]
        return PagedPlan(page_table=page_table, window=window, launches=tuple(launches))

    def _check(self, page_table: Tensor, queries: Int64, kv: Int64, window: int | None) -> None:
        check(page_table, "page_table", (len(kv), None), torch.int32)
        used = queries > 0
        if (bad := np.flatnonzero((queries < 0) | (used & (kv < queries)))).size:
            raise InputError(f"row {bad[0]} has {queries[bad[0]]} queries but {kv[bad[0]]} tokens")
        room = page_table.shape[1] * self._shape.page_tokens
        if (bad := np.flatnonzero(used & (kv > room))).size:
            raise InputError(f"row {bad[0]}: {kv[bad[0]]} tokens do not fit in {page_table.shape[1]} pages")
        if self._shape.tree and window is not None and window < TREE_TOKENS:
            raise InputError(f"a window of {window} tokens is narrower than a tree; {TREE_TOKENS} are the least")

    def _parts(
        self, first: Int64, queries: Int64, kv: Int64, window: int | None, capacity: Capacity | None, fixed: int
    ) -> Iterator[_Part]:
        longest = int(queries.max(initial=0)) if capacity is None else capacity.row_tokens
        for name, chosen in self._classes(queries, longest):
            tile = self._tiles[name]
            split = tile.split
            if fixed:
                split = replace(split, fixed=fixed) if split.level else Split(programs=0)
            counts = np.where(chosen, queries, 0)
            work = plan_work(first, counts, kv, tile.tiling, split, window=window, tree=self._shape.tree)
            if capacity is None:
                units, tiles, slots = len(work.units), len(work.reductions), work.slots
                most = int(counts.max(initial=0))
            else:
                most = min(longest, SHORT_ROW) if split.level else longest
                mine = replace(capacity, row_tokens=most)
                units, tiles = mine.units(tile.tiling, split), mine.tiles(tile.tiling)
                slots = units if split.programs or split.fixed else 0
                tiles = tiles if slots else 0
            yield _Part(
                name=name, units=(work.units, units), reductions=(work.reductions, tiles), slots=slots, row_tokens=most
            )

    def _classes(self, queries: Int64, longest: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Programs that a step needs, with the rows that each one computes."""
        short = queries <= SHORT_ROW
        narrow = min(longest, SHORT_ROW) * self._shape.group <= SMALL_TILE
        yield "decode" if narrow else "verify", short
        if longest > SHORT_ROW:
            yield "extend", ~short

    def _launch(self, part: _Part, units: Tensor, reductions: Tensor) -> Launch:
        shape, block_m = self._shape, self._tiles[part.name].tiling.block_m
        states = part.slots * shape.kv_heads * block_m
        sums = self._workspace[states * shape.dim : states * (shape.dim + 1)]
        return Launch(
            name=part.name,
            units=units,
            reductions=reductions if part.slots else None,
            partial_out=self._workspace[: states * shape.dim].view(part.slots, shape.kv_heads, block_m, shape.dim),
            partial_lse=sums.view(part.slots, shape.kv_heads, block_m),
            row_tokens=part.row_tokens,
        )
