"""Faults on purpose, around any transport: the conformance tests run every wire through this.

Messages and chunks are dropped, delayed, duplicated, reordered; payload bits flip; and slots are overwritten long after
their chunk was sent, as a transport without a fence would do after an abort. The hello is left alone. Faults hit what
this side sends, so wrap both sides.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from baton_kvtransfer.channel import Channel, Land
from baton_kvtransfer.transport import Dialed, Listener, Transport
from baton_kvtransfer.wires import Caps, Landing, Reach, Wire
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot

_LONGEST_DELAY = 6  # sends
_HANDSHAKE = frozenset({"hello", "welcome", "refused"})


@dataclass(slots=True, kw_only=True)
class Faults:
    """Probabilities per message or chunk; may be changed while it runs. `done` counts what was done."""

    random: Random
    drop: float = 0.0
    delay: float = 0.0  # sent after some later messages: reorders, too
    duplicate: float = 0.0
    flip: float = 0.0  # one bit of the payload
    late_write: float = 0.0  # garbage into a slot that was used before
    spare: frozenset[str] = frozenset({"alive"})  # kinds that arrive as they are
    done: dict[str, int] = field(default_factory=dict)
    reaches: list[ChaosReach] = field(default_factory=list)

    def hits(self, name: str, probability: float) -> bool:
        hit = self.random.random() < probability
        if hit:
            self.done[name] = self.done.get(name, 0) + 1
        return hit


class ChaosTransport:
    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self.wires: Mapping[str, Wire] = {name: ChaosWire(wire, faults) for name, wire in inner.wires.items()}

    def listen(self) -> Listener:
        return ChaosListener(self._inner.listen(), self._faults)

    def close(self) -> None:
        self._inner.close()

    def dial(self, address: str) -> Dialed:
        dialed = self._inner.dial(address)
        channel = ChaosChannel(dialed.channel, self._faults)
        return Dialed(channel=channel, wires=dialed.wires, reason=dialed.reason)


class ChaosListener:
    def __init__(self, inner: Listener, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self.address = inner.address

    def filenos(self) -> Sequence[int]:
        return self._inner.filenos()

    def accept(self) -> list[Channel]:
        return [ChaosChannel(channel, self._faults) for channel in self._inner.accept()]

    def close(self) -> None:
        self._inner.close()


class ChaosChannel:
    def __init__(self, inner: Channel, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._held: deque[tuple[int, PeerMessage, bytes | None]] = deque()  # (sends to wait, ...)
        self.carries_fds = inner.carries_fds
        self.fileno = inner.fileno
        self.close = inner.close
        self.take_fds = inner.take_fds

    def receive(self, land: Land) -> PeerMessage | None:
        return self._inner.receive(land)

    def queue(self, message: PeerMessage) -> None:
        self.send(message)

    def flush(self) -> None:
        self._inner.flush()

    def send(self, message: PeerMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        faults, kind = self._faults, message.WhichOneof("kind")
        if kind in _HANDSHAKE or kind in faults.spare:
            self._inner.send(message, payload, fds)
            self._release(len(self._held) * _LONGEST_DELAY)
            return
        if faults.hits("drop", faults.drop):
            pass
        elif faults.hits("delay", faults.delay):
            copy = None if payload is None else bytes(payload)
            self._held.append((faults.random.randint(1, _LONGEST_DELAY), message, copy))
            return
        else:
            self._inner.send(message, payload)
            if faults.hits("duplicate", faults.duplicate):
                self._inner.send(message, payload)
        self._release(len(self._held))

    def _release(self, looks: int) -> None:
        """Every look at a held message is one send less to wait for; a heartbeat lets all of them go."""
        for _ in range(looks):
            if not self._held:
                return
            left, message, payload = self._held.popleft()
            if left > 1:
                self._held.append((left - 1, message, payload))
            else:
                self._inner.send(message, None if payload is None else memoryview(payload))


class ChaosWire:
    def __init__(self, inner: Wire, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self.name = inner.name
        self.caps: Caps = inner.caps
        self.land: Callable[..., Landing] = inner.land
        self.start, self.close = inner.start, inner.close

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> Reach:
        return ChaosReach(self._inner.reach(welcome, channel, wake), self._faults, late=self.caps.remote_memory)


class ChaosReach:
    """Writes late into any slot except the one that is being gathered.

    No wire lets anybody else write there: shm copies synchronously on this very thread, and others gather into local
    staging memory. That exception is what a digest over the window rests on. Where windows are staging memory, the
    garbage goes out with a write that is under way.
    """

    def __init__(self, inner: Reach, faults: Faults, *, late: bool) -> None:
        self._inner = inner
        self._faults = faults
        self._late = late
        self.settled = inner.settled
        self._lock = threading.Lock()  # tests write late from threads of their own
        self._gathering: int | None = None
        self._written: dict[int, memoryview] = {}  # slot -> what we once wrote
        if late:
            faults.reaches.append(self)

    def window(self, slot: Slot, size: int) -> memoryview:
        window = self._inner.window(slot, size)
        with self._lock:
            self._written[slot.index] = window
            self._gathering = slot.index
        return window

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        faults = self._faults
        if faults.hits("flip", faults.flip):
            window[faults.random.randrange(window.nbytes)] ^= 1 << faults.random.randrange(8)
        with self._lock:
            self._gathering = None
        sent = self._inner.push(channel, message, window)
        if self._late and faults.hits("late_write", faults.late_write):
            self.write_late(faults.random)
        return sent

    def write_late(self, random: Random) -> bool:
        """What a transport without a fence does: an old write lands now, in a slot that may be in use again."""
        with self._lock:
            targets = [view for index, view in self._written.items() if index != self._gathering]
            if not targets:
                return False
            target = random.choice(targets)
            at = random.randrange(target.nbytes)
            target[at : at + 64] = random.randbytes(min(64, target.nbytes - at))
            return True

    def fence(self) -> None:
        with self._lock:
            self._written.clear()
        self._inner.fence()
