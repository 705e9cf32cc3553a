"""Landing slots of one link: the receiver's table of generations and the sender's credits.

A credit (index, generation) is the right to write that slot once. The receiver raises the generation whenever it takes
the slot back, so a chunk with an older one is late and means nothing. Slots belong to a link, never to a transfer.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton_kvtransfer.errors import WireError
from baton_proto.peer_pb2 import Slot


class SlotTable:
    """Receiver: every slot is always credited to the peer, at its current generation."""

    def __init__(self, count: int) -> None:
        self._generations = [1] * count

    def __len__(self) -> int:
        return len(self._generations)

    def is_current(self, slot: Slot) -> bool:
        """False for a late chunk. Raises WireError for a slot that does not exist."""
        if slot.index >= len(self._generations):
            raise WireError(f"slot {slot.index} of {len(self._generations)}")
        return slot.generation == self._generations[slot.index]

    def advance(self, index: int) -> Slot:
        """Take the slot back and credit it anew."""
        self._generations[index] += 1
        return Slot(index=index, generation=self._generations[index])

    def snapshot(self) -> list[Slot]:
        return [Slot(index=index, generation=generation) for index, generation in enumerate(self._generations)]


class Credits:
    """Sender: slots that may be written now, oldest first. A credit counts once, however often it is announced."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # index -> newest generation ever credited
        self._free: dict[int, int] = {}
        self._used: dict[int, int] = {}  # taken, and no newer credit came
        self._suspects: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._free)

    def set_up(self, slots: Iterable[Slot]) -> None:
        """The initial credits of the link."""
        self._seen = {slot.index: slot.generation for slot in slots}
        self._free = dict(self._seen)

    def add(self, slots: Iterable[Slot]) -> bool:
        """True when at least one is new. Raises WireError for a slot that was never announced."""
        fresh = False
        for slot in slots:
            if slot.index not in self._seen:
                raise WireError(f"credit for unknown slot {slot.index}")
            if slot.generation > self._seen[slot.index]:
                self._seen[slot.index] = self._free[slot.index] = slot.generation
                self._used.pop(slot.index, None)
                fresh = True
        return fresh

    def take(self) -> Slot | None:
        if not self._free:
            return None
        index = next(iter(self._free))
        generation = self._used[index] = self._free.pop(index)
        return Slot(index=index, generation=generation)

    def put_back(self, slot: Slot) -> None:
        """Undo `take`: nothing was written."""
        if self._seen[slot.index] == slot.generation:
            self._free[slot.index] = slot.generation
            self._used.pop(slot.index, None)

    def missed(self) -> list[Slot]:
        """Call once per heartbeat: what was used before the last call and has not come back."""
        used = set(self._used.items())
        missed = sorted(used & self._suspects)
        self._suspects = used
        return [Slot(index=index, generation=generation) for index, generation in missed]
