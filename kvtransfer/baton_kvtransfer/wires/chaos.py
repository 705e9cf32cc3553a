"""Faults on purpose, around any transport: the conformance tests run every wire through this.

Messages and chunks are dropped, delayed, duplicated, reordered; payload bits flip; and slots are overwritten long after
their chunk was sent, as a transport without a fence would do after an abort. The hello is left alone. Faults hit what
this side sends, so wrap both sides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from baton_kvtransfer.channel import Channel, Land
from baton_kvtransfer.transport import Dialed, Listener, Transport
from baton_kvtransfer.wires import Caps, Landing, Reach, Wire
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot

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

    def send(self, message: PeerMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        faults, kind = self._faults, message.WhichOneof("kind")
        if kind in _HANDSHAKE or kind in faults.spare:
            self._inner.send(message, payload, fds)
        elif faults.hits("drop", faults.drop):
            pass
        elif faults.hits("delay", faults.delay):
            copy = None if payload is None else bytes(payload)
            self._held.append((faults.random.randint(1, 6), message, copy))
            return
        else:
            self._inner.send(message, payload)
            if faults.hits("duplicate", faults.duplicate):
                self._inner.send(message, payload)
        self._release()

    def _release(self) -> None:
        for _ in range(len(self._held)):
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

    def reach(self, welcome: PeerWelcome, channel: Channel) -> Reach:
        return ChaosReach(self._inner.reach(welcome, channel), self._faults, late=self.caps.remote_memory)


class ChaosReach:
    def __init__(self, inner: Reach, faults: Faults, *, late: bool) -> None:
        self._inner = inner
        self._faults = faults
        self._late = late
        self._written: dict[int, memoryview] = {}  # slot -> what we once wrote

    def window(self, slot: Slot, size: int) -> memoryview:
        window = self._inner.window(slot, size)
        self._written[slot.index] = window
        return window

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> None:
        faults = self._faults
        if faults.hits("flip", faults.flip):
            window[faults.random.randrange(window.nbytes)] ^= 1 << faults.random.randrange(8)
        self._inner.push(channel, message, window)
        if self._late and faults.hits("late_write", faults.late_write):
            self.write_late()

    def write_late(self) -> None:
        """What a transport without a fence does: an old write lands now, in a slot that may be in use again."""
        target = self._written[self._faults.random.choice(list(self._written))]
        target[:] = self._faults.random.randbytes(target.nbytes)

    def fence(self) -> None:
        self._written.clear()
        self._inner.fence()
