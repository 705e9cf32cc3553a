"""The transfers of one handoff between several ranks, as far as one rank has them: all of them, or none.

`ended` gathers their outcomes; when every route is through, `done` gets the receipts, and the first that fails aborts
the others and becomes the outcome. Thread-safe. Like its transfers, it speaks once, and not after `abort`.
Copies of the others may still run when a failure is told: as after any end, the pages wait for the fence of `abort`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.records import Fence, Receipt

Abort = Callable[[TransferId, BatonError], Fence]
"""`KvEndpoint.cancel`, or that of the `Transfer` with this id. Called once for each that is open, with a lock held: it
must not call back."""
Done = Callable[[Sequence[Receipt] | BatonError], None]


class Handoff:
    """`transfers`: ids of this rank's routes; all must be open, or expected, before `ended` says something of one.
    `done` is called on the thread that ended the last of them."""

    def __init__(self, transfers: Iterable[TransferId], abort: Abort, done: Done) -> None:
        self._abort = abort
        self._done = done
        self._lock = threading.Lock()
        self._open = dict.fromkeys(transfers)
        self._receipts: list[Receipt] = []
        self._fences: list[Fence] = []
        self._over = False

    def ended(self, transfer_id: TransferId, outcome: Receipt | BatonError) -> None:
        """One transfer is over. What is said of it again, or after the handoff is over, counts for nothing."""
        with self._lock:
            if self._over or transfer_id not in self._open:
                return
            del self._open[transfer_id]
            if isinstance(outcome, BatonError):
                self._give_up(outcome)
            else:
                self._receipts.append(outcome)
                if self._open:
                    return
                self._over = True
        self._done(outcome if isinstance(outcome, BatonError) else self._receipts)

    def abort(self, error: BatonError) -> Fence:
        """The owner gives up, or lets go of the pages of one that failed; idempotent. The pages may be freed when the
        fence is done."""
        with self._lock:
            self._give_up(error)
            return _All(tuple(self._fences))

    def _give_up(self, error: BatonError) -> None:
        """With the lock held. Only the first abort of a transfer has the fence of its copies."""
        self._over = True
        self._fences += [self._abort(transfer_id, error) for transfer_id in self._open]
        self._open.clear()


class _All:
    def __init__(self, fences: Sequence[Fence]) -> None:
        self._fences = fences

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)
