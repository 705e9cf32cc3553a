"""Which block of KV travels in which chunk: pure arithmetic on ranges, no bytes, no page ids.

A block is (layers, heads, positions); its payload is [layer, kv, head, token, dim], contiguous. Blocks know positions,
not pages: each side splits them at its own page borders. Heads are those of the transfer, from 0; each side knows where
in its pool they begin. A layout here is that of the transfer: its heads, and the dtype of its payloads.
Invariant: the blocks taken from one Pending cover every (layer, head, position) of the transfer exactly once; Coverage
checks the same on the other side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from baton_kvtransfer.layout import DTYPE_BYTES, SCALE_BYTES, SCALED, PageLayout


class Block(NamedTuple):
    """A tuple, because several are made for each chunk."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    token_begin: int
    token_end: int

    @property
    def layers(self) -> int:
        return self.layer_end - self.layer_begin

    @property
    def heads(self) -> int:
        return self.head_end - self.head_begin

    @property
    def tokens(self) -> int:
        return self.token_end - self.token_begin

    @property
    def cells(self) -> int:
        """(layer, head, position)s."""
        return self.layers * self.heads * self.tokens

    def shape(self, layout: PageLayout) -> tuple[int, int, int, int, int]:
        """Of the payload."""
        return (self.layers, layout.kv, self.heads, self.tokens, layout.dim)

    def bytes(self, layout: PageLayout) -> int:
        """Of the payload, scales included."""
        return self.cells * cell_bytes(layout)

    def values_bytes(self, layout: PageLayout) -> int:
        """Of the payload, without its scales."""
        return self.layers * self.heads * self.tokens * layout.kv * layout.dim * DTYPE_BYTES[layout.dtype]

    def moved(self, heads: int) -> Block:
        """The same cells where the transfer's heads begin at head `heads` of a pool."""
        if heads == 0:
            return self
        return self._replace(head_begin=self.head_begin + heads, head_end=self.head_end + heads)


@dataclass(frozen=True, slots=True)
class PageRun:
    """Positions of a block in one page: payload tokens [begin, begin + count) <-> page tokens from `offset`."""

    page: int  # index in the page table
    offset: int
    begin: int
    count: int


def cell_bytes(layout: PageLayout) -> int:
    """Payload bytes of one (layer, head, position)."""
    scale = SCALE_BYTES if layout.dtype in SCALED else 0
    return layout.kv * (layout.dim * DTYPE_BYTES[layout.dtype] + scale)


def page_runs(block: Block, page_tokens: int) -> Iterator[PageRun]:
    position = block.token_begin
    while position < block.token_end:
        page, offset = divmod(position, page_tokens)
        count = min(page_tokens - offset, block.token_end - position)
        yield PageRun(page, offset, position - block.token_begin, count)
        position += count


class Pending:
    """What was announced as ready and not yet taken, for one transfer.

    Neighbouring announcements melt into one range, so that a chunk is filled with as many layers as fit a slot.
    """

    def __init__(self, *, layout: PageLayout, slot_bytes: int, first_token: int, end_token: int) -> None:
        heads_fit = slot_bytes // cell_bytes(layout)
        if heads_fit == 0:
            raise ValueError(
                f"slot_bytes is {slot_bytes}, one position of one head takes {cell_bytes(layout)}; raise slot_bytes"
            )
        self._layout = layout
        self._slot_bytes = slot_bytes
        self._end_token = end_token
        step = min(heads_fit, layout.heads)
        self._head_groups = [(begin, min(begin + step, layout.heads)) for begin in range(0, layout.heads, step)]
        self._frontier = [first_token] * layout.layers  # per layer: announced up to here
        self._ranges: deque[Block] = deque()

    @property
    def complete(self) -> bool:
        """Everything was announced."""
        return all(position == self._end_token for position in self._frontier)

    @property
    def empty(self) -> bool:
        return not self._ranges

    @property
    def left_cells(self) -> int:
        """Announced and not taken: (layer, head, position)s."""
        return sum(block.cells for block in self._ranges)

    def add(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int) -> None:
        """Announce; what lies outside the transfer or was announced before is ignored. ValueError for a gap."""
        if not 0 <= layer_begin <= layer_end <= self._layout.layers:
            raise ValueError(f"layers [{layer_begin}, {layer_end}) of {self._layout.layers}")
        end = min(token_end, self._end_token)
        layer = layer_begin
        while layer < layer_end:  # runs of layers that stand at the same position
            start, run_end = self._frontier[layer], layer
            while run_end < layer_end and self._frontier[run_end] == start:
                run_end += 1
            if token_begin > start and start < self._end_token:
                raise ValueError(f"layer {layer}: positions [{start}, {token_begin}) were not announced")
            if start < end:
                self._frontier[layer:run_end] = [end] * (run_end - layer)
                for head_begin, head_end in self._head_groups:
                    self._append(
                        Block(
                            layer_begin=layer,
                            layer_end=run_end,
                            head_begin=head_begin,
                            head_end=head_end,
                            token_begin=start,
                            token_end=end,
                        )
                    )
            layer = run_end

    def _append(self, block: Block) -> None:
        last = self._ranges[-1] if self._ranges else None
        if last is not None and (last.head_begin, last.head_end) == (block.head_begin, block.head_end):
            same_tokens = (last.token_begin, last.token_end) == (block.token_begin, block.token_end)
            same_layers = (last.layer_begin, last.layer_end) == (block.layer_begin, block.layer_end)
            if same_tokens and last.layer_end == block.layer_begin:
                self._ranges[-1] = last._replace(layer_end=block.layer_end)
                return
            if same_layers and last.token_end == block.token_begin:
                self._ranges[-1] = last._replace(token_end=block.token_end)
                return
        self._ranges.append(block)

    def take(self) -> Block | None:
        """The next chunk, or None when there is none, or when waiting will fill it better (less than half a slot)."""
        if not self._ranges:
            return None
        whole = self._ranges[0]
        row_bytes = whole.heads * cell_bytes(self._layout)  # one position of one layer
        tokens_fit = self._slot_bytes // row_bytes
        if tokens_fit >= whole.tokens:
            layers = min(whole.layers, tokens_fit // whole.tokens)
            block = whole if layers == whole.layers else whole._replace(layer_end=whole.layer_begin + layers)
            may_grow = len(self._ranges) == 1 and block is whole and not self.complete
            if may_grow and 2 * block.bytes(self._layout) <= self._slot_bytes:
                return None
        else:
            token_end = whole.token_begin + tokens_fit
            border = token_end - token_end % self._layout.page_tokens
            block = whole._replace(
                layer_end=whole.layer_begin + 1,
                token_end=border if border > whole.token_begin else token_end,
            )
        self._ranges.popleft()
        if block.layer_end < whole.layer_end:
            self._ranges.appendleft(whole._replace(layer_begin=block.layer_end))
        if block.token_end < whole.token_end:
            self._ranges.appendleft(whole._replace(layer_end=block.layer_end, token_begin=block.token_end))
        return block


class Coverage:
    """Which cells of a transfer arrived. Head ranges must be equal or disjoint, as senders own fixed heads."""

    def __init__(self, *, layout: PageLayout, first_token: int, end_token: int) -> None:
        self._layout = layout
        self._first = first_token
        self._end = end_token
        self._missing = layout.layers * layout.heads * (end_token - first_token)
        self._heads: set[tuple[int, int]] = set()
        self._arrived: dict[tuple[int, int], int] = {}  # (layer, first head) -> bit set of positions

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def refuses(self, block: Block) -> str:
        """Why the block cannot belong to this transfer; "" when it can."""
        layout = self._layout
        if not 0 <= block.layer_begin < block.layer_end <= layout.layers:
            return f"layers [{block.layer_begin}, {block.layer_end}) of {layout.layers}"
        if not 0 <= block.head_begin < block.head_end <= layout.heads:
            return f"heads [{block.head_begin}, {block.head_end}) of {layout.heads}"
        if not self._first <= block.token_begin < block.token_end <= self._end:
            return f"positions [{block.token_begin}, {block.token_end}) of [{self._first}, {self._end})"
        heads = (block.head_begin, block.head_end)
        if heads not in self._heads and any(begin < heads[1] and heads[0] < end for begin, end in self._heads):
            return f"heads [{block.head_begin}, {block.head_end}) overlap an earlier, different range"
        bits = self._bits(block)
        for layer in range(block.layer_begin, block.layer_end):
            if self._arrived.get((layer, block.head_begin), 0) & bits:
                return f"layer {layer}: positions [{block.token_begin}, {block.token_end}) arrived before"
        return ""

    def add(self, block: Block) -> None:
        """Count a block that `refuses` let pass."""
        bits = self._bits(block)
        self._heads.add((block.head_begin, block.head_end))
        for layer in range(block.layer_begin, block.layer_end):
            key = (layer, block.head_begin)
            self._arrived[key] = self._arrived.get(key, 0) | bits
        self._missing -= block.layers * block.heads * block.tokens

    def _bits(self, block: Block) -> int:
        return ((1 << block.tokens) - 1) << (block.token_begin - self._first)
