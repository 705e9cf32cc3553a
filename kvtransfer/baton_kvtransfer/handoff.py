"""The transfers of one handoff between several ranks, as far as one rank has them: all of them, or none.

`ended` gathers their outcomes; when every route is through, `done` gets the receipts, and the first that fails aborts
the others and becomes the outcome. Thread-safe. Like its transfers, it speaks once, and not after `abort`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.records import Fence, Receipt

Abort = Callable[[TransferId, BatonError], Fence]
"""`KvEndpoint.cancel`, or that of the `Transfer` with this id."""
Done = Callable[[Sequence[Receipt] | BatonError], None]


class Handoff:
    """`transfers`: ids of this rank's routes. `done` is called on the thread that ended the last of them."""

    def __init__(self, transfers: Iterable[TransferId], abort: Abort, done: Done) -> None:
        self._abort = abort
        self._done = done
        self._lock = threading.Lock()
        self._open = dict.fromkeys(transfers)
        self._receipts: list[Receipt] = []
        self._over = False

    def ended(self, transfer_id: TransferId, outcome: Receipt | BatonError) -> None:
        """One transfer is over. What is said of it again, or after the handoff is over, counts for nothing."""
        with self._lock:
            if self._over or transfer_id not in self._open:
                return
            del self._open[transfer_id]
            failed = isinstance(outcome, BatonError)
            if isinstance(outcome, Receipt):
                self._receipts.append(outcome)
            if self._open and not failed:
                return
            self._over = True
            rest = list(self._open)
        if isinstance(outcome, BatonError):
            for other in rest:
                self._abort(other, outcome)
            self._done(outcome)
        else:
            self._done(self._receipts)

    def abort(self, error: BatonError) -> Fence:
        """The owner gives up; idempotent. The pages may be freed when the fence is done."""
        with self._lock:
            self._over = True
            rest = list(self._open)
        return _All([self._abort(transfer_id, error) for transfer_id in rest])


class _All:
    def __init__(self, fences: Sequence[Fence]) -> None:
        self._fences = fences

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)
