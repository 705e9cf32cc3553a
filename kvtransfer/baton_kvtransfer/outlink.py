"""A link on which we send KV: dials the peer, says hello, gathers and pushes chunks.

One thread does all of it: a gather never overlaps another gather of the same link, and results are delivered in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.blocks import Blocks, seal_of
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.errors import Aborted, KVTransferError, LayoutMismatch, NoSlots, StalePeer, WireError, from_wire
from baton_kvtransfer.link import Link, Local
from baton_kvtransfer.protocol import PROTOCOL_VERSION
from baton_kvtransfer.pulling import Asked
from baton_kvtransfer.records import Receipt
from baton_kvtransfer.sending import Ended, Push, Sender
from baton_kvtransfer.transfer import Command, Transfer
from baton_kvtransfer.transport import Dialed
from baton_kvtransfer.wires import Reach
from baton_kvtransfer.wires.choice import host_id
from baton_proto.common_pb2 import ERROR_KIND_OVERLOADED
from baton_proto.peer_pb2 import PeerHello, PeerMessage, PeerRefused, PeerWelcome

log = logging.getLogger(__name__)

MAX_SLOTS = 1024
MAX_SLOT_BYTES = 64 << 20
"""What we believe of a welcome; the settings cannot ask for more."""


class OutLink(Link):
    def __init__(
        self, *, address: str, incarnation: str, local: Local, asked: Asked, ended: Callable[[Link], None]
    ) -> None:
        super().__init__(name=f"baton-kv-out-{incarnation[:8]}", local=local, direction="out", ended=ended)
        self._address = address
        self._peer_incarnation = incarnation
        self._transfers: dict[TransferId, Transfer] = {}
        self._asked = asked
        self._reach: Reach | None = None
        self._digest = ""  # kind, agreed in the handshake
        self._blocks: Blocks = local.blocks  # with payloads as agreed in the handshake
        self._flying: dict[int, Push] = {}  # by slot: written by the wire, header not sent
        self._gauged_slots = 0
        self._sender = Sender(layout=local.layout, slot_bytes=local.config.slot_bytes, timers=local.timers)

    def open(self, transfer: Transfer) -> bool:
        """From any thread. False: this link is over, take another."""

        def command() -> None:
            self._transfers[transfer.order.transfer_id] = transfer
            self._sender.open(transfer.order, self._local.clock.now())

        return self.post(command)

    def pull(self, transfer_id: TransferId, question: PeerMessage) -> bool:
        """From any thread. False: this link is over, take another. The end of the link ends the pull."""

        def command() -> None:
            self._asked.add(transfer_id)
            self._sender.messages.append(question)

        return self.post(command)

    def tell(self, command: Command) -> None:
        """From any thread; nothing happens when the link is over, because then its transfers are too."""
        self.post(lambda: command(self._sender))

    # ---- the thread ---------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        dialed = self._local.transport.dial(self._address)
        try:
            self._handshake(dialed)
            self._loop(dialed.channel)
            self._say_goodbye(dialed.channel)
        finally:
            dialed.channel.close()

    def _handshake(self, dialed: Dialed) -> None:
        local = self._local
        hello = PeerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=local.worker_id,
            incarnation=local.incarnation,
            compat=local.compat,
            wires=dialed.wires,
            digests=local.blocks.digests,
            payloads=local.blocks.payloads,
            host_id=host_id(),
            target_incarnation=self._peer_incarnation,
        )
        dialed.channel.send(PeerMessage(hello=hello))
        answer = self._await(dialed.channel, local.clock.now() + local.config.connect_timeout_s)
        match answer.WhichOneof("kind"):
            case "welcome":
                self._welcomed(answer.welcome, dialed)
            case "refused":
                refusal = self._refusal(answer.refused)
                self._reason, self._state = refusal.message, "refused"
                raise refusal
            case kind:
                raise WireError(f"expected a welcome, got {kind or 'an empty message'}", phase="hello")

    def _welcomed(self, welcome: PeerWelcome, dialed: Dialed) -> None:
        wire = self._local.transport.wires.get(welcome.wire)
        if wire is None or welcome.wire not in dialed.wires or welcome.digest not in self._local.blocks.digests:
            raise WireError(
                f"the peer chose wire {welcome.wire!r}, digest {welcome.digest!r}: not offered", phase="hello"
            )
        if welcome.payload not in self._local.blocks.payloads:
            raise WireError(f"the peer chose payloads of {welcome.payload!r}: not offered", phase="hello")
        if not 0 < len(welcome.slots) <= MAX_SLOTS or not 0 < welcome.slot_bytes <= MAX_SLOT_BYTES:
            raise WireError(f"the peer offers {len(welcome.slots)} slots of {welcome.slot_bytes} bytes", phase="hello")
        self._digest, self._blocks = welcome.digest, self._local.blocks.for_payloads(welcome.payload)
        self._reach = wire.reach(welcome, dialed.channel, self._waker.wake)
        self._sender.connected(
            peer=welcome.worker_id,
            wire=welcome.wire,
            slots=welcome.slots,
            slot_bytes=welcome.slot_bytes,
            payload=welcome.payload,
            now_s=self._local.clock.now(),
        )
        self._peer_id, self._wire, self._state = welcome.worker_id, welcome.wire, "up"
        self._reason = "; ".join(part for part in (dialed.reason, welcome.reason) if part)
        self._count_as_up()
        log.info("link up", extra={"peer": self._peer_id, "direction": "out", "wire": self._wire, "why": self._reason})

    def _refusal(self, refused: PeerRefused) -> KVTransferError:
        peer = self._address
        if refused.field == "incarnation":
            return StalePeer(refused.error.message, peer=peer, phase="hello")
        if refused.field:  # the peer's "ours" is their value here
            return LayoutMismatch(refused.field, refused.theirs, refused.ours, peer=peer)
        if refused.error.kind == ERROR_KIND_OVERLOADED:
            retry_ms = refused.error.retry_after_ms
            return NoSlots(refused.error.message, peer=peer, phase="hello", retry_after_ms=retry_ms)
        return from_wire(refused.error, transfer_id="", peer=peer, phase="hello")

    def _read_one(self, channel: Channel) -> bool:
        message = channel.receive(_no_payload)
        if message is None:
            return False
        if message.WhichOneof("kind") == "pull_refused":
            self._asked.refused(message.pull_refused, self._peer_id)
            return True
        self._sender.receive(message, self._local.clock.now())
        return True

    def _work(self, channel: Channel) -> bool:
        assert self._reach is not None, "set by the handshake"
        settled = self._reach.settled(channel)
        if settled:
            for index in settled:
                self._pushed(self._flying.pop(index))
            return True  # their headers leave before the next gather begins
        push = self._sender.next_push()
        if push is None:
            return False
        self._queue_messages(channel)  # Reserve and the like come before the chunk
        self._push(push, channel)
        return True

    def _push(self, push: Push, channel: Channel) -> None:
        assert self._reach is not None, "set by the handshake"
        assert self._counters is not None, "set by the handshake"
        transfer = self._transfers[push.order.transfer_id]
        chunk = push.chunk
        window = self._reach.window(chunk.slot, chunk.bytes)
        if not transfer.gate.enter():
            self._sender.unpushed(push)
            return
        try:
            chunk.digest = self._blocks.gather(push.block, push.order.pages, window, seal_of(chunk, self._digest))
        finally:
            transfer.gate.leave()
        clock = self._local.clock
        begin_s = clock.now()
        sent = self._reach.push(channel, push.message, window)
        self._counters.posted(clock.now() - begin_s)
        if sent:
            self._pushed(push)
        else:
            self._flying[chunk.slot.index] = push

    def _pushed(self, push: Push) -> None:
        self._sender.pushed(push, self._local.clock.now())
        transfer = self._transfers.get(push.order.transfer_id)
        if transfer is not None:
            transfer.backlog.left(push.block)
        self._bytes += push.chunk.bytes
        assert self._counters is not None, "set by the handshake"
        self._counters.moved(push.chunk.bytes)

    def _tick(self, now_s: float) -> None:
        self._sender.tick(now_s)
        self._asked.sweep()
        self._gauge_slots(self._sender.free_slots)

    def _gauge_slots(self, free: int) -> None:
        """Our share of a gauge over all links."""
        self._local.metrics.free_slots.inc(free - self._gauged_slots)
        self._gauged_slots = free

    def _flush(self, channel: Channel) -> None:
        self._queue_messages(channel)
        channel.flush()
        self._deliver()

    def _queue_messages(self, channel: Channel) -> None:
        while self._sender.messages:
            channel.queue(self._sender.messages.popleft())

    def _deliver(self) -> None:
        while self._sender.ended:
            self._end(self._sender.ended.popleft())

    def _end(self, ended: Ended) -> None:
        transfer, metrics = self._transfers.pop(ended.transfer_id), self._local.metrics
        told = transfer.end(ended.outcome)
        if not told or isinstance(ended.outcome, Aborted):
            metrics.aborts.labels("out").inc()
        if not told:
            return
        if isinstance(ended.outcome, Receipt):
            metrics.committed.labels("out").inc()
            metrics.resends.inc(ended.outcome.resends)
            metrics.handoff_seconds.labels("out").observe(ended.outcome.commit_s - ended.outcome.first_chunk_s)
            metrics.exposed_seconds.observe(ended.outcome.exposed_s)
        else:
            metrics.failed.labels("out", type(ended.outcome).__name__).inc()

    def _in_flight(self) -> int:
        return len(self._transfers)

    def _say_goodbye(self, channel: Channel) -> None:
        """Stopped by our own side: tell the peer, so that it does not have to guess from a broken connection."""
        now_s = self._local.clock.now()
        for transfer_id in list(self._transfers):
            self._sender.abort(transfer_id, Aborted("the sender was closed"), now_s)
        self._queue_messages(channel)
        channel.flush()

    def _lose(self, error: KVTransferError) -> None:
        if self._reach is not None:
            self._gauge_slots(0)
            self._reach.fence()
        self._asked.lose(error)
        self._sender.lose(error)
        self._deliver()
        for transfer in self._transfers.values():  # aborted by their owners, or by our goodbye
            transfer.end(_final(error, transfer))
        self._transfers.clear()


def _final(error: KVTransferError, transfer: Transfer) -> BatonError:
    return error.about(transfer.order.transfer_id, transfer.order.request_id, "closing")


def _no_payload(_message: PeerMessage, size: int) -> memoryview | None:
    raise WireError(f"{size} bytes of payload from a receiver")
