"""Transfers that this worker waits for, over all links. Thread-safe; the one place where a transfer ends.

Leaving the table decides the race between commit, failure and cancel: exactly one of them gets the entry, and closes
the gate to the pages. An unclaimed entry is one for which no peer has said Reserve yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.records import Inbound

Tell = Callable[[TransferId, BatonError], None]
"""How the claiming link learns of a cancel; called from any thread, must only enqueue."""


@dataclass(slots=True)
class Expected:
    inbound: Inbound
    gate: Gate = field(default_factory=Gate)
    tell: Tell | None = None


class Expectations:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[TransferId, Expected] = {}
        self._closing: dict[TransferId, Gate] = {}  # cancelled while a copy was running

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def add(self, inbound: Inbound) -> None:
        with self._lock:
            if inbound.transfer_id in self._entries:
                raise ValueError(f"transfer {inbound.transfer_id} is expected already")
            self._entries[inbound.transfer_id] = Expected(inbound)

    def claim(self, transfer_id: TransferId, tell: Tell) -> Expected | None:
        """For the link on which Reserve came. None: unknown, over, or on another link."""
        with self._lock:
            entry = self._entries.get(transfer_id)
            if entry is None or entry.tell is not None:
                return None
            entry.tell = tell
            return entry

    def end(self, transfer_id: TransferId) -> bool:
        """Commit or fail. False: somebody else ended it; then nothing may be said about it any more."""
        with self._lock:
            entry = self._entries.pop(transfer_id, None)
        if entry is None:
            return False
        entry.gate.close()
        return True

    def awaits(self, transfer_id: TransferId) -> bool:
        """Expected, and no peer has said Reserve for it yet."""
        with self._lock:
            entry = self._entries.get(transfer_id)
            return entry is not None and entry.tell is None

    def end_unclaimed(self, transfer_id: TransferId) -> Inbound | None:
        """It will not come. None: it is over, or a link brings it already and decides alone."""
        with self._lock:
            entry = self._entries.get(transfer_id)
            if entry is None or entry.tell is not None:
                return None
            del self._entries[transfer_id]
        entry.gate.close()
        return entry.inbound

    def cancel(self, transfer_id: TransferId, error: BatonError) -> Gate:
        """Its fence, also when it was cancelled before."""
        with self._lock:
            entry = self._entries.pop(transfer_id, None)
            gate = entry.gate if entry is not None else self._closing.get(transfer_id, Gate())
            gate.close()
            self._closing[transfer_id] = gate
            self._closing = {other: closing for other, closing in self._closing.items() if not closing.done()}
        if entry is None:
            return gate
        if entry.tell is not None:
            entry.tell(transfer_id, error)
        return gate

    def overdue(self, now_s: float) -> list[Inbound]:
        """Unclaimed ones past their deadline, for the caller to end."""
        with self._lock:
            return [
                entry.inbound
                for entry in self._entries.values()
                if entry.tell is None and entry.inbound.deadline_s <= now_s
            ]

    def next_deadline_s(self) -> float | None:
        with self._lock:
            return min((e.inbound.deadline_s for e in self._entries.values() if e.tell is None), default=None)

    def ids(self) -> list[TransferId]:
        with self._lock:
            return list(self._entries)
