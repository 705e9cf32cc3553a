"""A link on which we receive KV: answers the hello, lands chunks, verifies and scatters them.

One thread does all of it, so nothing scatters into a transfer's pages once its gate is closed and the running scatter
is over. The slots belong to this link alone and die with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from baton_common.errors import BatonError
from baton_kvtransfer.admission import Admission
from baton_kvtransfer.blocks import XXH3, Blocks, agreed_payload, seal_of
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.errors import (
    Aborted,
    KVTransferError,
    LayoutMismatch,
    PeerGone,
    PullDenied,
    StalePeer,
    WireError,
    to_wire,
)
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.link import Link, Local
from baton_kvtransfer.protocol import Cancelled, Failed, Received, Receiving
from baton_kvtransfer.pulling import order_from, refusal
from baton_kvtransfer.receiving import Landing as Landed
from baton_kvtransfer.receiving import Receiver, Verdict
from baton_kvtransfer.records import InboundEvents
from baton_kvtransfer.slots import SlotTable
from baton_kvtransfer.wires import Landing, Wire
from baton_proto.peer_pb2 import PeerHello, PeerMessage, PeerRefused, PeerWelcome, Pull

log = logging.getLogger(__name__)

_CREDIT_SHARE = 2
"""Slots are credited when that part of them is free again, or when there is nothing to read: often enough that both
sides copy at once, and not between the last chunk and the end of its transfer."""


class InLink(Link):
    def __init__(
        self,
        *,
        channel: Channel,
        number: int,
        local: Local,
        admission: Admission,
        expected: Expectations,
        events: InboundEvents,
        ended: Callable[[Link], None],
    ) -> None:
        super().__init__(name=f"baton-kv-in-{number}", local=local, direction="in", ended=ended)
        self._channel = channel
        self._admission = admission
        self._expected = expected
        self._events = events
        self._slots = SlotTable(local.config.slots_per_peer)
        self._slots_at_once = max(1, len(self._slots) // _CREDIT_SHARE)
        self._memory: Landing | None = None
        self._receiver: Receiver | None = None
        self._remote_memory = self._header_first = False
        self._digest = ""  # kind, agreed in the handshake
        self._blocks: Blocks = local.blocks  # with payloads as agreed in the handshake
        self._replaced = False

    # ---- handshake ----------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        try:
            self._handshake()
            self._loop(self._channel)
            self._say_goodbye()
            if self._replaced:
                raise PeerGone("a newer link of the same worker replaced this one", phase="hello")
        finally:
            if self._memory is not None:
                self._memory.fence()  # before anything is told: a request that fails may have its pages reused
            self._channel.close()

    def _cut(self) -> None:
        self._replaced = True
        self.stop()

    def _handshake(self) -> None:
        local = self._local
        message = self._await(self._channel, local.clock.now() + local.config.connect_timeout_s)
        if message.WhichOneof("kind") != "hello":
            raise WireError("the first message must be a hello", phase="hello")
        hello = message.hello
        self._peer_id, self._peer_incarnation = hello.worker_id, hello.incarnation
        try:
            self._digest, wire = self._choose_digest(hello), self._choose_wire(hello)
            payload = agreed_payload(sender=hello.payloads, receiver=local.blocks.payloads)
            self._admission.admit(hello, self._cut)
        except KVTransferError as error:
            self._reason, self._state = error.message, "refused"
            self._channel.send(PeerMessage(refused=_refused(error)))
            raise
        self._blocks = local.blocks.for_payloads(payload)
        self._memory = wire.land(slots=len(self._slots), slot_bytes=local.config.slot_bytes)
        self._remote_memory, self._header_first = wire.caps.remote_memory, wire.caps.header_first
        self._receiver = Receiver(
            layout=replace(local.layout, dtype=payload),
            slots=self._slots,
            expected=self._expected,
            timers=local.timers,
            peer=hello.worker_id,
            wire=wire.name,
            now_s=local.clock.now(),
            wake=self._waker.wake,
        )
        welcome = PeerWelcome(
            worker_id=local.worker_id,
            incarnation=local.incarnation,
            wire=wire.name,
            digest=self._digest,
            payload=payload,
            slot_bytes=local.config.slot_bytes,
            slots=self._slots.snapshot(),
            region=self._memory.region,
        )
        self._channel.send(PeerMessage(welcome=welcome), fds=self._memory.fds)
        self._wire, self._state = wire.name, "up"
        self._reason = f"first of {', '.join(hello.wires)} that both sides can do"
        self._count_as_up()
        log.info("link up", extra={"peer": self._peer_id, "direction": "in", "wire": wire.name})

    def _choose_digest(self, hello: PeerHello) -> str:
        ours = self._local.blocks.digests
        theirs: tuple[str, ...] = tuple(hello.digests)
        for kind in theirs:
            if kind in ours:
                return kind
        raise LayoutMismatch("digests", ", ".join(ours), ", ".join(theirs))

    def _choose_wire(self, hello: PeerHello) -> Wire:
        wires = self._local.transport.wires
        for name in hello.wires:
            wire = wires.get(name)
            if wire is not None and (self._channel.carries_fds or not wire.caps.same_host):
                return wire
        raise LayoutMismatch("wires", ", ".join(wires), ", ".join(hello.wires))

    # ---- the thread ---------------------------------------------------------------------------------------------
    def _read_one(self, channel: Channel) -> bool:
        message = channel.receive(self._land)
        if message is None:
            return False
        receiver, clock = self._up()
        if message.WhichOneof("kind") == "pull":
            self._on_pull(message.pull)
            return True
        if message.WhichOneof("kind") == "chunk" and message.chunk.bytes > self._local.config.slot_bytes:
            raise WireError(f"chunk of {message.chunk.bytes} bytes for slots of {self._local.config.slot_bytes}")
        landed = receiver.receive(message, clock())
        if landed is not None:
            verdict = self._scatter(landed)
            receiver.landed(landed, verdict, clock())
            self._count(landed, verdict)
            if receiver.owed_slots >= self._slots_at_once:
                self._flush(channel)  # the sender fills them while the next chunk is copied here
        return True

    def _on_pull(self, message: Pull) -> None:
        def refuse(error: BatonError) -> None:
            self.post(lambda: self._up()[0].messages.append(refusal(message.transfer_id, error)))

        try:
            order = order_from(message, peer=self._peer_id, incarnation=self._peer_incarnation, refuse=refuse)
        except PullDenied as error:
            refuse(error)
            return
        self._events.on_pull(order)

    def _up(self) -> tuple[Receiver, Callable[[], float]]:
        assert self._receiver is not None, "made by the handshake"
        return self._receiver, self._local.clock.now

    def _land(self, message: PeerMessage, size: int) -> memoryview | None:
        """Only tcp has payload in the stream, and only chunks have any."""
        chunk = message.chunk
        if self._remote_memory or message.WhichOneof("kind") != "chunk" or chunk.bytes != size:
            raise WireError(f"{size} bytes of payload where none belong")
        assert self._memory is not None, "made by the handshake"
        return self._memory.slot(chunk.slot.index, size)

    def _scatter(self, landed: Landed) -> Verdict:
        assert self._memory is not None, "made by the handshake"
        chunk = landed.chunk
        payload, seal = self._memory.slot(chunk.slot.index, chunk.bytes), seal_of(chunk, self._digest)
        if self._header_first and self._digest == XXH3 and seal.over(payload) != chunk.digest:
            return Verdict.DAMAGED  # else its bytes could come between the copy and the digest
        if not landed.gate.enter():
            return Verdict.CLOSED
        try:
            intact = self._blocks.scatter(
                landed.block,
                landed.pages,
                payload,
                seal,
                digest=chunk.digest,
                shared=self._remote_memory,
            )
        finally:
            landed.gate.leave()
        return Verdict.GOOD if intact else Verdict.DAMAGED

    def _count(self, landed: Landed, verdict: Verdict) -> None:
        assert self._counters is not None, "made by the handshake"
        self._bytes += landed.chunk.bytes
        self._counters.moved(landed.chunk.bytes)
        if verdict is Verdict.DAMAGED:
            self._local.metrics.digest_failures.inc()
            log.warning(
                "damaged chunk",
                extra={"peer": self._peer_id, "transfer": landed.transfer_id, "sequence": landed.chunk.sequence},
            )

    def _work(self, channel: Channel) -> bool:
        return False

    def _tick(self, now_s: float) -> None:
        self._up()[0].tick(now_s)

    def _flush(self, channel: Channel) -> None:
        receiver, clock = self._up()
        receiver.flush(clock())
        if receiver.events:
            self._deliver()
        if receiver.messages:
            while receiver.messages:
                channel.queue(receiver.messages.popleft())
            channel.flush()

    def _deliver(self) -> None:
        receiver, _ = self._up()
        metrics = self._local.metrics
        while receiver.events:
            match receiver.events.popleft():
                case Receiving(transfer_id=transfer_id):
                    self._events.on_receiving(transfer_id)
                case Received(transfer_id=transfer_id, first=first, receipt=receipt):
                    self._events.on_received(transfer_id, first, receipt)
                    metrics.committed.labels("in").inc()
                    metrics.handoff_seconds.labels("in").observe(receipt.commit_s - receipt.first_chunk_s)
                case Failed(transfer_id=transfer_id, error=error):
                    self._events.on_failed(transfer_id, error)
                    metrics.failed.labels("in", type(error).__name__).inc()
                    if isinstance(error, Aborted):
                        metrics.aborts.labels("in").inc()
                case Cancelled():
                    metrics.aborts.labels("in").inc()

    def _in_flight(self) -> int:
        return 0 if self._receiver is None else len(self._receiver)

    def _say_goodbye(self) -> None:
        """Stopped by our own side: tell the peer why its transfers end."""
        receiver, clock = self._up()
        receiver.abort_all(Aborted("the receiver was closed"), clock())
        self._flush(self._channel)

    def _lose(self, error: KVTransferError) -> None:
        self._admission.leave(self._peer_id, self._cut)
        if self._receiver is not None:
            self._receiver.lose(error)
            self._deliver()


def _refused(error: BatonError) -> PeerRefused:
    refused = PeerRefused(error=to_wire(error))
    if isinstance(error, LayoutMismatch):
        refused.field, refused.ours, refused.theirs = error.field, error.ours, error.theirs
    elif isinstance(error, StalePeer):
        refused.field = "incarnation"
    return refused
