"""Which requests exist, which queue, row and pages each has, and how each of them ends.

Invariants: a request leaves with exactly one Ended; it is FREED only after every fence on its pages; a row belongs to
one request; pages that the role knows are let go only with the role's fence.
The way out: FINISHED | HANDED_OFF | ABORTING -> (KvRelease -> kv_released) -> FENCING -> FREED -> Ended.
Does not know: budgets, steps, stop rules.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from baton_common.errors import BatonError, DeadlineExceeded
from baton_common.hashing import salted_root
from baton_common.ids import RequestId, RowId
from baton_engine.kv.cache import KvCache
from baton_engine.kv.pages import LeakError
from baton_engine.request import Mode, Phase, Request
from baton_engine.role import Fence
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.entry import Entry, EntryQueue
from baton_engine.sched.records import Ended, KvRelease, Outcome, Preempted


class Lifecycle:
    def __init__(self, config: SchedulerConfig, cache: KvCache) -> None:
        self._config = config
        self.cache = cache
        self.entries: dict[RequestId, Entry] = {}
        self.waiting = EntryQueue()  # QUEUED
        self.filling = EntryQueue()  # FILLING: pages that the role fills
        self.filled = EntryQueue()  # FILLING: done with that, but no row yet
        self.staged = EntryQueue()  # RESERVED, RECEIVING: pages, but no KV yet
        self.ready = EntryQueue()  # READY: KV, but no row yet
        self.prefilling = EntryQueue()  # row and pages; part of the prompt is not planned yet
        self.decoding = EntryQueue()  # the next token is one decode away, its first token may be in flight
        self.outbox: list[Outcome] = []
        self.preemptions = 0
        self.submitted = 0
        self.ended = 0
        self._rows: list[int] = list(range(config.rows))  # a heap: low rows first keep the batch dense
        self._fencing: dict[RequestId, Entry] = {}  # FENCING
        self._yielding: dict[RequestId, Entry] = {}  # preempted, pages not obtainable yet
        self._deadlines: list[tuple[float, int, RequestId]] = []  # a heap; ended requests are skipped

    # ---- in -------------------------------------------------------------------------------------------------------
    def enter(self, request: Request, now_s: float) -> Entry:
        self.submitted += 1
        root = salted_root(self._config.hash_root, request.cache_salt)
        entry = Entry(request=request, sequence=self.submitted, queued_s=now_s, root=root)
        self.entries[request.request_id] = entry
        request.stamps.setdefault(request.phase, now_s)
        heapq.heappush(self._deadlines, (request.deadline_s, entry.sequence, request.request_id))
        return entry

    def find(self, request_id: RequestId) -> Entry | None:
        """None when the request is unknown or on its way out: the event came too late to matter."""
        entry = self.entries.get(request_id)
        return None if entry is None or entry.over else entry

    # ---- rows -----------------------------------------------------------------------------------------------------
    @property
    def free_rows(self) -> int:
        return len(self._rows)

    def take_row(self, entry: Entry) -> None:
        entry.row = RowId(heapq.heappop(self._rows))
        entry.row_told = False
        entry.table_told = 0

    def give_row(self, entry: Entry) -> None:
        """A step in flight may still compute the row; the next owner's step runs behind it on the same queue."""
        if entry.row is not None:
            heapq.heappush(self._rows, entry.row)
            entry.row = None

    # ---- out ------------------------------------------------------------------------------------------------------
    def refuse(self, request: Request, error: BatonError, now_s: float) -> None:
        """End a request that never entered."""
        for phase in (Phase.ABORTING, Phase.FENCING, Phase.FREED):
            request.advance(phase, now_s)
        self.submitted += 1
        self.ended += 1
        self.outbox.append(Ended(request=request, error=error))

    def fail(self, entry: Entry, error: BatonError, now_s: float) -> None:
        entry.error = error
        self.finish(entry, Phase.ABORTING, now_s)

    def finish(self, entry: Entry, to: Phase, now_s: float) -> None:
        """Take `to` (FINISHED, HANDED_OFF or ABORTING) and start the way out."""
        entry.request.advance(to, now_s)
        self._yielding.pop(entry.request.request_id, None)
        self._park(entry)
        if entry.announced:
            self._ask_release(entry)
        elif not entry.releasing:
            self._fence(entry, now_s)

    def kv_released(self, request_id: RequestId, fence: Fence, now_s: float) -> None:
        entry = self.entries.get(request_id)
        if entry is None or not entry.releasing:
            raise LeakError(f"{request_id}: a release fence that nobody asked for", request_id=request_id)
        entry.releasing = False
        entry.fences.append(fence)
        if entry.over:
            self._fence(entry, now_s)
        else:
            self._let_go(entry)
            self.requeue(entry, now_s)

    # ---- preemption -----------------------------------------------------------------------------------------------
    def preempt(self, entry: Entry, now_s: float) -> None:
        """Give row and pages back; what is in the tree stays there. Tokens in flight are still collected."""
        request = entry.request
        request.advance(Phase.PREEMPTED, now_s)
        request.preemptions += 1
        self.preemptions += 1
        committed = 0 if entry.lease is None else len(entry.lease.path) * self._config.page_tokens
        self.outbox.append(Preempted(request=request, lost_tokens=entry.planned - committed))
        self._park(entry)
        self._yielding[request.request_id] = entry
        if entry.announced:
            self._ask_release(entry)
        else:
            self._let_go(entry)
        self.requeue(entry, now_s)

    def requeue(self, entry: Entry, now_s: float) -> None:
        """PREEMPTED -> QUEUED, once its last step was collected and its pages are let go."""
        if entry.request.phase is Phase.PREEMPTED and not entry.open_steps and entry.lease is None:
            entry.request.advance(Phase.QUEUED, now_s)
            entry.request.mode = Mode.LOCAL  # what is left is done here, whoever computed the prompt before
            entry.queued_s = now_s
            self.waiting.add(entry)

    def pages_coming(self) -> bool:
        """Pages of ended or preempted requests will come without anybody's help, within a step or so."""
        leaving = (*self._fencing.values(), *self._yielding.values())
        return any(entry.step_fenced for entry in leaving) or any(entry.releasing for entry in self._yielding.values())

    # ---- each iteration -------------------------------------------------------------------------------------------
    def retire(self, now_s: float) -> None:
        # Entries before pages: fences finish meanwhile, and a FREED request must not have pages in flight.
        for request_id, entry in list(self._fencing.items()):
            if _all_done(entry.fences):
                del self._fencing[request_id]
                self._free(entry, now_s)
        for request_id, entry in list(self._yielding.items()):
            if entry.lease is None and _all_done(entry.fences):
                del self._yielding[request_id]
        self.cache.retire()
        self._expire(now_s)

    @property
    def fencing(self) -> int:
        return len(self._fencing)

    def next_deadline_s(self) -> float | None:
        while self._deadlines and self._deadlines[0][2] not in self.entries:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def check(self) -> None:
        """Rows, queues and pages against each other; raises LeakError naming the owner."""
        self.cache.check(entry.lease for entry in self.entries.values() if entry.lease is not None)
        rows = [entry.row for entry in self.entries.values() if entry.row is not None]
        if sorted([*self._rows, *rows]) != list(range(self._config.rows)):
            owners = {entry.row: name for name, entry in self.entries.items() if entry.row is not None}
            raise LeakError(f"rows are lost or doubled: free {sorted(self._rows)}, owned {owners}")
        for name, entry in self.entries.items():
            if entry.over and (entry.row is not None or entry.queue is not None):
                raise LeakError(f"{name} is {entry.request.phase.value} but still scheduled", request_id=name)

    # ---- inside ---------------------------------------------------------------------------------------------------
    def _park(self, entry: Entry) -> None:
        if entry.queue is not None:
            entry.queue.remove(entry)
        self.give_row(entry)

    def _ask_release(self, entry: Entry) -> None:
        entry.announced = False
        entry.releasing = True
        self.outbox.append(KvRelease(request=entry.request, error=entry.error))

    def _let_go(self, entry: Entry) -> None:
        """lease -> tree (cached) or in flight behind the fences, or free when there are none."""
        if entry.last_step is not None and entry.last_step not in entry.fences:
            entry.fences.append(entry.last_step)
        if entry.lease is not None:
            self.cache.release(entry.lease, entry.fences)
            entry.lease = None

    def _fence(self, entry: Entry, now_s: float) -> None:
        self._let_go(entry)
        entry.request.advance(Phase.FENCING, now_s)
        if _all_done(entry.fences):
            self._free(entry, now_s)
        else:
            self._fencing[entry.request.request_id] = entry

    def _free(self, entry: Entry, now_s: float) -> None:
        request = entry.request
        request.advance(Phase.FREED, now_s)
        del self.entries[request.request_id]
        self.ended += 1
        self.outbox.append(Ended(request=request, error=entry.error))

    def _expire(self, now_s: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, sequence, request_id = heapq.heappop(self._deadlines)
            entry = self.find(request_id)
            if entry is None or entry.sequence != sequence:
                continue
            request = entry.request
            late = f"deadline passed after {deadline_s - request.arrival_s:.1f} s in phase {request.phase.value}"
            self.fail(entry, DeadlineExceeded(late, request_id=request_id), now_s)
        if len(self._deadlines) > 2 * len(self.entries) + 64:
            self._deadlines = [item for item in self._deadlines if item[2] in self.entries]
            heapq.heapify(self._deadlines)


def _all_done(fences: Iterable[Fence]) -> bool:
    return all(fence.done() for fence in fences)
