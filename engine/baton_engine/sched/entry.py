"""What the scheduler remembers of one request, and the ordered queues that hold it.

An entry is in at most one queue; the queue and the request's phase say together what may happen next.
`planned` runs ahead of `written` by the steps in flight: results are collected one step late.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton_common.errors import BatonError
from baton_common.hashing import extend_chain
from baton_common.ids import PageHash, RowId
from baton_engine.kv.cache import Lease
from baton_engine.request import Phase, Request
from baton_engine.role import Fence

OVER = frozenset({Phase.FINISHED, Phase.HANDED_OFF, Phase.ABORTING, Phase.FENCING, Phase.FREED})


class StepFence:
    """Done when the device's fence of one step is; a step that was planned but not launched yet is not done."""

    def __init__(self) -> None:
        self._fence: Fence | None = None

    def attach(self, fence: Fence) -> None:
        self._fence = fence

    def done(self) -> bool:
        return self._fence is not None and self._fence.done()


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """Mutable, owned by the scheduler. Positions count from the start of `request.tokens`."""

    request: Request
    sequence: int  # order of arrival; also breaks ties everywhere
    queued_s: float
    root: PageHash
    queue: EntryQueue | None = None
    row: RowId | None = None
    row_told: bool = False  # a plan held the RowAdmission
    table_told: int = 0  # pages of the table that plans held
    lease: Lease | None = None
    goal: int = 0  # positions to prefill before decoding: all tokens at admission
    planned: int = 0  # KV of [0, planned) is in the pages, or a planned step puts it there
    written: int = 0  # KV of [0, written) is in the pages: its step was collected
    pending: int = 0  # sampled tokens that were not collected yet
    open_steps: int = 0  # planned steps with work of this request that were not collected yet
    last_step: StepFence | None = None
    announced: bool = False  # the role reads or writes the pages: KvRelease is due
    releasing: bool = False  # KvRelease is out, its fence has not come back
    fences: list[Fence] = field(default_factory=list)
    cached_told: bool = False
    error: BatonError | None = None

    @property
    def over(self) -> bool:
        return self.request.phase in OVER

    @property
    def order(self) -> tuple[int, int]:
        """Higher priority first, then older first."""
        return (-self.request.priority, self.sequence)

    @property
    def remaining(self) -> int:
        """Positions of the prompt that no step was planned for."""
        return self.goal - self.planned

    @property
    def length(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.request.tokens) + self.pending

    def ends_by_itself(self, context_tokens: int) -> bool:
        """No decode follows the tokens in flight: known on the host without seeing them."""
        request = self.request
        return request.output_tokens + self.pending >= request.sampling.max_tokens or self.length >= context_tokens

    def hash_pages(self, tokens: int, page_tokens: int) -> list[PageHash]:
        """Chained hashes of the full pages in the first `tokens` tokens; each is computed once."""
        return hash_pages(self.request, self.root, tokens, page_tokens)

    @property
    def step_fenced(self) -> bool:
        """Its pages are let go, and wait for a step in flight."""
        return self.last_step is not None and not self.last_step.done() and self.last_step in self.fences


def hash_pages(request: Request, root: PageHash, tokens: int, page_tokens: int) -> list[PageHash]:
    """The chain from `root` over the full pages in the first `tokens` tokens; `request.hashes` remembers it."""
    hashes = request.hashes
    full, known = tokens // page_tokens, len(hashes)
    if full > known:
        parent = hashes[-1] if known else root
        fresh = request.tokens[known * page_tokens : full * page_tokens]
        hashes.extend(extend_chain(parent, fresh, page_tokens))
    return hashes[:full]


class EntryQueue:
    """Entries by `order`. O(log n) to find, O(n) pointers to move; queues are bounded."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Over a snapshot: the loop body may move entries."""
        return iter(self._entries.copy())

    def add(self, entry: Entry) -> None:
        """Moves the entry here from the queue that holds it."""
        if entry.queue is not None:
            entry.queue.remove(entry)
        insort(self._entries, entry, key=_order)
        entry.queue = self

    def remove(self, entry: Entry) -> None:
        index = bisect_left(self._entries, entry.order, key=_order)
        if self._entries[index] is not entry:
            raise LookupError(f"{entry.request.request_id} is not in this queue")
        del self._entries[index]
        entry.queue = None


def _order(entry: Entry) -> tuple[int, int]:
    return entry.order
