"""Rows that must be zero: pages that a late write reached, pages and slots that leaked, damage that was not seen.

Late writes come from a thread that keeps writing garbage into slots used before, as a transport without a fence does
after an abort; the aborts hit transfers in the middle. Damage is done to chunks between gather and landing.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from baton_common.errors import BatonError
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.transport import Dialed, Listener, Transport
from baton_kvtransfer.wires import Caps, Landing, Reach, Wire
from baton_kvtransfer.wires.chaos import ChaosTransport, Faults
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot
from bench.kvtransfer.remote import Remote
from bench.kvtransfer.twins import LAYOUT, LIMIT_S, SLOTS, Run, Twins, wait_done
from bench.report import Report, Row

ABORTS = 10_000
DOOMED_AT_ONCE = 4
DAMAGED_CHUNKS = 600
SHARE = 0.2
"""Of the chunks that are damaged: most transfers end well after a resend."""
KINDS = ("bit flip", "stale chunk", "swapped heads")


def measure(report: Report, seconds: float) -> None:
    late = Remote(LateWrites)
    try:
        found: Mapping[str, int] = late.call("run", ABORTS)
    finally:
        late.close()
    note = f"{found['aborts']} aborts, {found['late writes']} late writes, {found['good']} good handoffs between"
    for what in ("corrupted pages", "leaked pages", "leaked slots"):
        _zero(report, f"late writes after aborts, shm: {what}", found[what], note)
    for wire in ("shm", "tcp"):
        damage = Remote(Damage, wire)
        try:
            for kind in KINDS:
                done, seen, wrong = damage.call("run", kind, DAMAGED_CHUNKS)
                _zero(report, f"{kind}, {wire}: not detected", done - seen, f"{seen} of {done} detected")
                _zero(report, f"{kind}, {wire}: handoffs with wrong bytes", wrong, "")
        finally:
            damage.close()


def _zero(report: Report, name: str, value: int, note: str) -> None:
    report.add(Row(name=name, value=value, unit="", goal=0, lower_is_better=True, note=note))


class LateWrites:
    def __init__(self) -> None:
        self._faults = Faults(random=random.Random(0))
        self._twins = Twins("shm", lambda inner: ChaosTransport(inner, self._faults))
        self._stop = threading.Event()
        self._late = 0

    def run(self, aborts: int) -> dict[str, int]:
        writer = threading.Thread(target=self._write_late)
        writer.start()
        try:
            found = self._abort(aborts)
        finally:
            self._stop.set()
            writer.join()
        end_s = time.monotonic() + LIMIT_S
        while self._held_slots() and time.monotonic() < end_s:
            time.sleep(0.01)
        twins = self._twins
        held = twins.sender.in_flight() + twins.receiver.in_flight()
        pages = sum(len(side.pool) - len(side.free) for side in (twins.sender, twins.receiver))
        return found | {"late writes": self._late, "leaked pages": pages + held, "leaked slots": self._held_slots()}

    def _abort(self, aborts: int) -> dict[str, int]:
        found = Counter(aborts=0, good=0)
        found["corrupted pages"] = 0
        twins = self._twins
        while found["aborts"] < aborts:
            doomed = [twins.start(70) for _ in range(DOOMED_AT_ONCE)]
            for run in doomed:
                run.transfer.ready(0, LAYOUT.layers, 0, run.tokens)
            honest = twins.send(60)
            for number, run in enumerate(doomed):
                self._end(run, by_sender=bool(number % 2))
                found["aborts"] += 1
            if honest.received.wait():
                found["good"] += 1
                found["corrupted pages"] += not twins.is_right(honest)
            honest.sent.wait()
            twins.reuse(honest)
            found["corrupted pages"] += twins.corrupted_pages()
        return dict(found)

    def _end(self, run: Run, *, by_sender: bool) -> None:
        error = BatonError("changed my mind")
        endpoint = self._twins.receiver.endpoint
        if by_sender:
            fences = [run.transfer.abort(error)]
            run.received.wait()
        else:
            fences = [endpoint.cancel(run.name, error), run.transfer.abort(error)]
        for fence in fences:
            wait_done(fence)
        self._twins.reuse(run)

    def _write_late(self) -> None:
        chance = random.Random(3)
        while not self._stop.wait(0.0005):
            self._late += sum(reach.write_late(chance) for reach in self._faults.reaches)

    def _held_slots(self) -> int:
        return SLOTS - round(self._twins.sender.metric("free_slots"))

    def close(self) -> None:
        self._twins.close()


class Damage:
    def __init__(self, wire: str) -> None:
        self._harm = Harm()
        self._twins = Twins(wire, lambda inner: HarmTransport(inner, self._harm))

    def run(self, kind: str, chunks: int) -> tuple[int, int, int]:
        """Damaged chunks, those that the receiver saw, handoffs that ended well with wrong bytes."""
        harm, twins = self._harm, self._twins
        before, harm.done, wrong = twins.receiver.metric("digest_failures_total"), 0, 0
        harm.kind = kind
        while harm.done < chunks:
            runs = [twins.send(64) for _ in range(4)]
            for run in runs:
                if run.received.wait():
                    wrong += not twins.is_right(run)
                run.sent.wait()
                twins.reuse(run)
        harm.kind = ""
        return harm.done, round(twins.receiver.metric("digest_failures_total") - before), wrong

    def close(self) -> None:
        self._twins.close()


class Harm:
    """What is done to chunks, and to how many it was done."""

    def __init__(self) -> None:
        self.kind = ""
        self.done = 0
        self._random = random.Random(7)
        self._former: dict[int, bytes] = {}  # slot -> the last payload written there

    def hurt(self, message: PeerMessage, window: memoryview) -> None:
        index = message.chunk.slot.index
        former = self._former.get(index, b"")
        self._former[index] = bytes(window)
        if not self.kind or self._random.random() > SHARE:
            return
        if self.kind == "bit flip":
            window[self._random.randrange(window.nbytes)] ^= 1 << self._random.randrange(8)
        elif self.kind == "stale chunk":
            if len(former) != window.nbytes or former == window:  # a resend of the same chunk
                return
            window[:] = former  # the new bytes never landed, and the slot is announced all the same
        else:
            chunk = message.chunk
            words = np.frombuffer(window, np.int16)
            layers, heads = chunk.layer_end - chunk.layer_begin, chunk.head_end - chunk.head_begin
            cells = words.reshape(layers, LAYOUT.kv, heads, -1)
            cells[:] = cells[:, :, ::-1].copy()
        self.done += 1


class HarmTransport:
    def __init__(self, inner: Transport, harm: Harm) -> None:
        self._inner = inner
        self._harm = harm
        self.dial: Callable[[str], Dialed] = inner.dial
        self.close = inner.close

    @property
    def wires(self) -> Mapping[str, Wire]:
        return {name: HarmWire(wire, self._harm) for name, wire in self._inner.wires.items()}

    def listen(self) -> Listener:
        return self._inner.listen()


class HarmWire:
    def __init__(self, inner: Wire, harm: Harm) -> None:
        self._inner = inner
        self._harm = harm
        self.name = inner.name
        self.caps: Caps = inner.caps
        self.land: Callable[..., Landing] = inner.land
        self.start, self.close = inner.start, inner.close

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> Reach:
        return HarmReach(self._inner.reach(welcome, channel, wake), self._harm)


class HarmReach:
    def __init__(self, inner: Reach, harm: Harm) -> None:
        self._inner = inner
        self._harm = harm
        self.fence = inner.fence

    def window(self, slot: Slot, size: int) -> memoryview:
        return self._inner.window(slot, size)

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        self._harm.hurt(message, window)
        return self._inner.push(channel, message, window)

    def settled(self, channel: Channel) -> Sequence[int]:
        return self._inner.settled(channel)
