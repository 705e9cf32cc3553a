"""A wire made of an engine: landing memory that it registers, and staging memory that it writes from.

A chunk is gathered into the staging slot of the same number as the landing slot, written, and announced on the channel
once it is visible. Staging memory is freed when its last write is over; landing memory never (see `memory`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from baton_kvtransfer.channel import Channel
from baton_kvtransfer.errors import KVTransferError
from baton_kvtransfer.wires import Caps
from baton_kvtransfer.wires.oneside.engine import Engine, Target
from baton_kvtransfer.wires.oneside.memory import SlotMemory
from baton_kvtransfer.wires.oneside.pump import Pump
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot

_START_S = 30.0
"""Devices are opened and asked what they can do."""


class OnesideWire:
    caps = Caps(same_host=False, remote_memory=True, detects_death=True, header_first=True)
    """A write that is done for its sender left the network; the header takes another way into the receiver's memory."""

    def __init__(self, name: str, open_engine: Callable[[], Engine], *, limit_s: float) -> None:
        """`limit_s` bounds each call of the library that a handshake waits for."""
        self.name = name
        self._limit_s = limit_s
        self._pump = Pump(name, open_engine)

    def start(self) -> None:
        self._pump.ask(lambda engine: None, _START_S)

    def land(self, *, slots: int, slot_bytes: int) -> OnesideLanding:
        memory = SlotMemory(slots * slot_bytes)
        announced = self._pump.ask(lambda engine: engine.land(memory.region), self._limit_s)
        return OnesideLanding(self._pump, memory, slot_bytes, announced)

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> OnesideReach:
        staging = SlotMemory(len(welcome.slots) * welcome.slot_bytes)
        target, most_writes = self._pump.ask(
            lambda engine: (engine.reach(welcome.region, staging.region), engine.most_writes), self._limit_s
        )
        return OnesideReach(self._pump, target, staging, welcome.slot_bytes, most_writes, wake)

    def close(self) -> None:
        self._pump.close()


class OnesideLanding:
    fds: Sequence[int] = ()

    def __init__(self, pump: Pump, memory: SlotMemory, slot_bytes: int, region: bytes) -> None:
        self._pump = pump
        self._memory = memory
        self._slot_bytes = slot_bytes
        self.region = region

    def slot(self, index: int, size: int) -> memoryview:
        begin = index * self._slot_bytes
        return self._memory.view[begin : begin + size]

    def fence(self) -> None:
        """The peer may go on writing, and nobody will ever see it."""
        memory = self._memory
        memory.pin()

        def forget(engine: Engine) -> None:
            engine.forget(memory.region)
            memory.empty()

        self._pump.tell(forget)


class OnesideReach:
    def __init__(
        self,
        pump: Pump,
        target: Target,
        staging: SlotMemory,
        slot_bytes: int,
        most_writes: int,
        wake: Callable[[], None],
    ) -> None:
        self._pump = pump
        self._target = target
        self._staging = staging
        self._slot_bytes = slot_bytes
        self._most_writes = most_writes
        self._wake = wake
        self._waiting: deque[tuple[int, int]] = deque()  # (slot, bytes) that were pushed and not handed to the pump
        self._headers: dict[int, PeerMessage] = {}  # by slot: handed to the pump
        self._over: deque[tuple[int, KVTransferError | None]] = deque()  # filled by the pump

    def window(self, slot: Slot, size: int) -> memoryview:
        begin = slot.index * self._slot_bytes
        return self._staging.view[begin : begin + size]

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        index = message.chunk.slot.index
        self._headers[index] = message
        self._waiting.append((index, window.nbytes))
        self._start()
        return False

    def settled(self, channel: Channel) -> Sequence[int]:
        settled = []
        while self._over:
            index, error = self._over.popleft()
            if error is not None:
                raise error
            channel.queue(self._headers.pop(index))
            settled.append(index)
        self._start()
        return settled

    def fence(self) -> None:
        """Writes under way go on; their memory waits for them."""
        self._pump.leave(self._target, self._staging)

    def _start(self) -> None:
        while self._waiting and len(self._headers) - len(self._waiting) < self._most_writes:
            index, size = self._waiting.popleft()
            self._pump.write(self._target, index * self._slot_bytes, size, partial(self._landed, index))

    def _landed(self, index: int, error: KVTransferError | None) -> None:
        self._over.append((index, error))
        self._wake()
