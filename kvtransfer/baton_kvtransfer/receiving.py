"""The receiving half of a link, pure: what each message means, when a transfer is whole, and how it ends.

    NEW -> RESERVED -> RECEIVING -> VERIFIED -> COMMITTED;  any -> ABORTING -> DRAINED

A chunk counts only after its landing was verified. Whatever happens to a chunk, its slot goes back to the peer with the
next generation, so slots cannot leak with transfers. Damaged and missing chunks are asked for again when the peer says
Sent, at most RESEND_ROUNDS times. Who ends a transfer is decided by `Expectations`, because a cancel may race with us.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageId, TransferId
from baton_kvtransfer.errors import Aborted, Corrupt, KVTransferError, LayoutMismatch, WireError, from_wire, to_wire
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.incoming import Incoming
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.plan import Block, Coverage
from baton_kvtransfer.protocol import (
    REMEMBERED_TRANSFERS,
    RESEND_ROUNDS,
    Cancelled,
    Event,
    Failed,
    Received,
    ReceiveState,
    Receiving,
    Timers,
    block_of,
    first_from_wire,
)
from baton_kvtransfer.records import Inbound
from baton_kvtransfer.slots import SlotTable
from baton_proto.peer_pb2 import (
    Alive,
    Chunk,
    Commit,
    Credit,
    Drained,
    Granted,
    PeerAbort,
    PeerMessage,
    Resend,
    Reserve,
    Sent,
    Slot,
)


class Verdict(Enum):
    """What became of a landing."""

    GOOD = "good"  # verified and in the pages
    DAMAGED = "damaged"  # the digest does not match
    CLOSED = "closed"  # the owner took the pages back


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """A chunk is in its slot: verify it, scatter it behind the gate, then call `landed`."""

    transfer_id: TransferId
    chunk: Chunk
    block: Block  # its heads as in the pool
    pages: Sequence[PageId]
    gate: Gate


class Receiver:
    def __init__(
        self,
        *,
        layout: PageLayout,
        slots: SlotTable,
        expected: Expectations,
        timers: Timers,
        peer: str,
        wire: str,
        now_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._layout = layout
        self._slots = slots
        self._expected = expected
        self._timers = timers
        self._peer = peer
        self._wire = wire
        self._alive_s = now_s
        self._wake = wake
        self._transfers: dict[TransferId, Incoming] = {}
        self._gates: dict[TransferId, Gate] = {}
        self._over: OrderedDict[TransferId, bool] = OrderedDict()  # -> committed
        self._cancelled: deque[tuple[TransferId, BatonError]] = deque()  # filled by any thread
        self._credits: list[Slot] = []
        self.messages: deque[PeerMessage] = deque()  # to be sent, in order
        self.events: deque[Event] = deque()  # to be told

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def owed_slots(self) -> int:
        """Free again, and the peer does not know it before the next `flush`."""
        return len(self._credits)

    def cancel(self, transfer_id: TransferId, error: BatonError) -> None:
        """From any thread: the owner took a transfer of ours back. The link thread acts on it when woken."""
        self._cancelled.append((transfer_id, error))
        self._wake()

    def abort_all(self, error: BatonError, now_s: float) -> None:
        """This side closes: every transfer fails, and the peer hears why."""
        for transfer in self._transfers.values():
            if transfer.state is not ReceiveState.ABORTING:
                self._fail(transfer, error, now_s)

    def lose(self, error: KVTransferError) -> None:
        """The link is over: every transfer fails with `error`."""
        self._take_cancelled(0.0)
        for transfer in self._transfers.values():
            if transfer.state is not ReceiveState.ABORTING:
                self._end(transfer.inbound.transfer_id, transfer.about(error))
        self._transfers.clear()
        self._gates.clear()

    def flush(self, now_s: float) -> None:
        """Put what was saved up into `messages`: cancels, and credits, which are worth one message together."""
        self._take_cancelled(now_s)
        if self._credits:
            self._say(PeerMessage(credit=Credit(slots=self._credits)))
            self._credits = []

    # ---- messages -----------------------------------------------------------------------------------------------
    def receive(self, message: PeerMessage, now_s: float) -> Landing | None:
        """Raises WireError when the peer breaks the protocol; then the link must be cut."""
        self._take_cancelled(now_s)
        match message.WhichOneof("kind"):
            case "chunk":
                return self._on_chunk(message.chunk, now_s)
            case "reserve":
                self._on_reserve(message.reserve, now_s)
            case "sent":
                self._on_sent(message.sent, now_s)
            case "abort":
                self._on_abort(message.abort)
            case "drained":
                transfer = self._transfers.get(TransferId(message.drained.transfer_id))
                if transfer is not None and transfer.state is ReceiveState.ABORTING:
                    transfer.advance(ReceiveState.DRAINED)
                    self._forget(transfer, committed=False)
            case "alive":
                for slot in message.alive.slots:
                    if self._slots.is_current(slot):  # its chunk was sent a period ago and is not here: lost
                        self._take_back(slot)
                for name in message.alive.transfer_ids:
                    if (held := self._transfers.get(TransferId(name))) is not None:
                        held.lease_s = now_s + self._timers.lease_s
            case kind:
                raise WireError(f"a sender may not send {kind or 'an empty message'}", peer=self._peer)
        return None

    def _on_reserve(self, reserve: Reserve, now_s: float) -> None:
        transfer_id = TransferId(reserve.transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            entry = None if transfer_id in self._over else self._expected.claim(transfer_id, self.cancel)
            if entry is None:
                self._refuse(transfer_id)
                return
            inbound = entry.inbound
            heads = inbound.heads[1] - inbound.heads[0] if inbound.heads else self._layout.heads
            layout = replace(self._layout, heads=heads)
            coverage = Coverage(layout=layout, first_token=inbound.first_token, end_token=inbound.end_token)
            transfer = Incoming(inbound=inbound, coverage=coverage, lease_s=now_s + self._timers.lease_s)
            self._transfers[transfer_id], self._gates[transfer_id] = transfer, entry.gate
            transfer.advance(ReceiveState.RESERVED)
            wanted = (("first_token", inbound.first_token), ("end_token", inbound.end_token), ("heads", heads))
            for field, ours in wanted:
                theirs = getattr(reserve, field)
                if ours != theirs:
                    phase = transfer.state.value
                    error = LayoutMismatch(field, ours, theirs, transfer_id=transfer_id, peer=self._peer, phase=phase)
                    self._fail(transfer, error, now_s)
                    return
        if transfer.state is not ReceiveState.ABORTING:
            self._say(PeerMessage(granted=Granted(transfer_id=transfer_id)))

    def _on_chunk(self, chunk: Chunk, now_s: float) -> Landing | None:
        if not self._slots.is_current(chunk.slot):
            return None  # late: whatever it was, Sent will tell what is missing
        transfer_id = TransferId(chunk.transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None and transfer_id not in self._over:
            self._refuse(transfer_id)
        wanted = (
            transfer is not None
            and transfer.state in (ReceiveState.RESERVED, ReceiveState.RECEIVING)
            and chunk.sequence not in transfer.verified
        )
        if transfer is None or not wanted:
            self._take_back(chunk.slot)
            return None
        block = block_of(chunk)
        objection = transfer.coverage.refuses(block)
        if not objection and chunk.bytes != block.bytes(self._layout):
            objection = f"{chunk.bytes} bytes for a block of {block.bytes(self._layout)}"
        if objection:
            self._take_back(chunk.slot)
            self._fail(transfer, transfer.broken(self._peer, objection), now_s)
            return None
        if transfer.state is ReceiveState.RESERVED:
            transfer.advance(ReceiveState.RECEIVING)
            transfer.first_chunk_s = now_s
            self.events.append(Receiving(transfer_id=transfer_id))
        inbound, gate = transfer.inbound, self._gates[transfer_id]
        block = block.moved(_first_head(inbound))
        return Landing(transfer_id=transfer_id, chunk=chunk, block=block, pages=inbound.pages, gate=gate)

    def landed(self, landing: Landing, verdict: Verdict, now_s: float) -> None:
        """The slot's bytes were used or given up."""
        self._take_back(landing.chunk.slot)
        transfer = self._transfers.get(landing.transfer_id)
        if transfer is None or transfer.state is not ReceiveState.RECEIVING:
            return
        if verdict is Verdict.GOOD:
            transfer.verified.add(landing.chunk.sequence)
            transfer.coverage.add(landing.block.moved(-_first_head(transfer.inbound)))
            transfer.bytes += landing.chunk.bytes
            transfer.last_chunk_s = now_s

    def _on_sent(self, sent: Sent, now_s: float) -> None:
        transfer_id = TransferId(sent.transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._refuse(transfer_id)
            return
        if transfer.state not in (ReceiveState.RESERVED, ReceiveState.RECEIVING):
            return
        missing = transfer.missing(sent)
        if missing:
            self._ask_again(transfer, sent, missing, now_s)
            return
        objection = transfer.objection(sent)
        if objection:
            self._fail(transfer, transfer.broken(self._peer, objection), now_s)
            return
        transfer.advance(ReceiveState.VERIFIED)
        if not self._expected.end(transfer_id):  # a cancel won; its message to us is on the way
            return
        transfer.advance(ReceiveState.COMMITTED)
        receipt = transfer.receipt(self._peer, self._wire, now_s)
        first = first_from_wire(sent.first) if sent.HasField("first") else None
        self.events.append(Received(transfer_id=transfer_id, first=first, receipt=receipt))
        self._forget(transfer, committed=True)
        self._say(PeerMessage(commit=Commit(transfer_id=transfer_id)))

    def _ask_again(self, transfer: Incoming, sent: Sent, missing: list[int], now_s: float) -> None:
        if sent.round == transfer.round:
            if transfer.round == RESEND_ROUNDS:
                text = f"{len(missing)} of {sent.chunks} chunks damaged or lost, also after {RESEND_ROUNDS} resends"
                phase = transfer.state.value
                error = Corrupt(text, transfer_id=sent.transfer_id, peer=self._peer, phase=phase)
                self._fail(transfer, error, now_s)
                return
            transfer.round += 1
            transfer.resends += len(missing)
        # an older round: Sent and our Resend crossed, or our Resend was lost; saying it twice is harmless
        resend = Resend(transfer_id=sent.transfer_id, sequences=missing, round=transfer.round)
        self._say(PeerMessage(resend=resend))

    def _on_abort(self, abort: PeerAbort) -> None:
        transfer_id = TransferId(abort.transfer_id)
        transfer = self._transfers.get(transfer_id)
        if self._over.get(transfer_id, False):
            self._say(PeerMessage(commit=Commit(transfer_id=transfer_id)))  # too late: we have it, and it is right
            return
        if transfer is not None:
            if transfer.state is not ReceiveState.ABORTING:
                phase = transfer.state.value
                error = from_wire(abort.error, transfer_id=transfer_id, peer=self._peer, phase=phase)
                self._end(transfer_id, error)
            transfer.advance(ReceiveState.DRAINED)
            self._forget(transfer, committed=False)
        self._say(PeerMessage(drained=Drained(transfer_id=transfer_id)))

    # ---- time ---------------------------------------------------------------------------------------------------
    def tick(self, now_s: float) -> None:
        """Call about every Timers.tick_s while transfers are held, else every Timers.alive_s.

        Raises WireError when the peer does not answer an Abort: only a fence ends that.
        """
        self._take_cancelled(now_s)
        if now_s >= self._alive_s:
            self._alive_s = now_s + self._timers.alive_s
            held = [t.inbound.transfer_id for t in self._transfers.values() if t.state is not ReceiveState.ABORTING]
            self._say(PeerMessage(alive=Alive(transfer_ids=held)))
            self._credits = self._slots.snapshot()  # heals lost credits; a known one counts for nothing
        for transfer in list(self._transfers.values()):
            if transfer.state is ReceiveState.ABORTING:
                if now_s >= transfer.answer_s:
                    raise WireError("no answer to an abort", peer=self._peer, phase="aborting")
                if now_s >= transfer.repeat_s:
                    self._repeat_abort(transfer, now_s)
            elif now_s >= transfer.inbound.deadline_s:
                late = transfer.late(self._peer, "deadline of the transfer", ErrorKind.DEADLINE)
                self._fail(transfer, late, now_s)
            elif now_s >= transfer.lease_s:
                self._fail(transfer, transfer.late(self._peer, "the peer no longer names the transfer"), now_s)

    # ---- helpers ------------------------------------------------------------------------------------------------
    def _take_cancelled(self, now_s: float) -> None:
        while self._cancelled:
            transfer_id, error = self._cancelled.popleft()
            transfer = self._transfers.get(transfer_id)
            if transfer is not None and transfer.state is not ReceiveState.ABORTING:
                self.events.append(Cancelled(transfer_id=transfer_id))
                self._say_abort(transfer, error, now_s)

    def _fail(self, transfer: Incoming, error: BatonError, now_s: float) -> None:
        self._end(transfer.inbound.transfer_id, error)
        self._say_abort(transfer, error, now_s)

    def _end(self, transfer_id: TransferId, error: BatonError) -> None:
        if self._expected.end(transfer_id):
            self.events.append(Failed(transfer_id=transfer_id, error=error))

    def _say_abort(self, transfer: Incoming, error: BatonError, now_s: float) -> None:
        transfer.advance(ReceiveState.ABORTING)
        transfer.error = error
        transfer.answer_s = now_s + self._timers.answer_s
        self._repeat_abort(transfer, now_s)

    def _repeat_abort(self, transfer: Incoming, now_s: float) -> None:
        assert transfer.error is not None, "set when the abort began"
        transfer.repeat_s = now_s + self._timers.alive_s
        self._say(PeerMessage(abort=PeerAbort(transfer_id=transfer.inbound.transfer_id, error=to_wire(transfer.error))))

    def _refuse(self, transfer_id: TransferId) -> None:
        """About a transfer that we do not hold: repeat what became of it."""
        if self._over.get(transfer_id, False):
            self._say(PeerMessage(commit=Commit(transfer_id=transfer_id)))
            return
        unknown = Aborted(
            "the receiver does not hold this transfer (cancelled, expired or never announced)", kind=ErrorKind.TRANSFER
        )
        self._say(PeerMessage(abort=PeerAbort(transfer_id=transfer_id, error=to_wire(unknown))))

    def _forget(self, transfer: Incoming, *, committed: bool) -> None:
        transfer_id = transfer.inbound.transfer_id
        del self._transfers[transfer_id], self._gates[transfer_id]
        self._over[transfer_id] = committed
        if len(self._over) > REMEMBERED_TRANSFERS:
            self._over.popitem(last=False)

    def _take_back(self, slot: Slot) -> None:
        self._credits.append(self._slots.advance(slot.index))

    def _say(self, message: PeerMessage) -> None:
        self.messages.append(message)


def _first_head(inbound: Inbound) -> int:
    """Of the transfer, in our pool."""
    return inbound.heads[0] if inbound.heads else 0
