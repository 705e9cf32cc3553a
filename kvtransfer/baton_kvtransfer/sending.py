"""The sending half of a link, pure: which message and which chunk goes out next, and how each transfer ends.

    QUEUED -> PREFILLING -> SENDING <-> SENT -> RELEASED;  any -> ABORTING -> DRAINED

Pages are read (gathered) in PREFILLING and SENDING only. Credits are the only flow control. Last chunk first: a slot
goes to the transfer that was announced to its end and has least left, every FAIR_TURNth to who waited longest. A
failure here is reported at once; only when nothing but the Commit is missing, the verdict waits for the peer's last
word, because the receiver may have committed already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import TransferId
from baton_kvtransfer.errors import KVTransferError, WireError, from_wire, to_wire
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.outgoing import Outgoing
from baton_kvtransfer.plan import Block, Pending
from baton_kvtransfer.protocol import SendState, Timers, first_to_wire
from baton_kvtransfer.records import FirstToken, Outbound, Receipt
from baton_kvtransfer.slots import Credits
from baton_proto.peer_pb2 import Alive, Chunk, Drained, PeerAbort, PeerMessage, Resend, Reserve, Sent, Slot

FAIR_TURN = 4
"""With n transfers that have something to send, none waits for more than FAIR_TURN * n chunks of others."""


class Push(NamedTuple):
    """Gather `block` into the slot, digest, send `message`; then `pushed`, or `unpushed` when the gate was closed."""

    order: Outbound
    block: Block  # its heads as in the pool
    message: PeerMessage  # the chunk, without its digest

    @property
    def chunk(self) -> Chunk:
        return self.message.chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    transfer_id: TransferId
    outcome: Receipt | BatonError


class Sender:
    def __init__(self, *, layout: PageLayout, slot_bytes: int, timers: Timers) -> None:
        self._layout = layout
        self._slot_bytes = slot_bytes
        self._timers = timers
        self._peer = ""
        self._wire = ""
        self._credits = Credits()
        self._progress_s = 0.0  # of the link: a chunk left or a new credit came
        self._alive_s = 0.0
        self._transfers: dict[TransferId, Outgoing] = {}
        self._turns: dict[TransferId, None] = {}  # an ordered set: who may have a chunk to send; first waited longest
        self._pushes = 0
        self._flying: dict[int, TransferId] = {}  # slot -> whose chunk is under way into it
        self.messages: deque[PeerMessage] = deque()  # to be sent, in order
        self.ended: deque[Ended] = deque()  # to be told

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def free_slots(self) -> int:
        return len(self._credits)

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def connected(
        self, *, peer: str, wire: str, slots: Iterable[Slot], slot_bytes: int, payload: str, now_s: float
    ) -> None:
        """The peer welcomed us, and payloads are of that dtype. Call before any transfer is opened."""
        self._layout = replace(self._layout, dtype=payload)
        self._peer, self._wire, self._slot_bytes = peer, wire, slot_bytes
        self._credits.set_up(slots)
        self._progress_s = self._alive_s = now_s

    # ---- commands -----------------------------------------------------------------------------------------------
    def open(self, order: Outbound, now_s: float) -> None:
        first, end = order.first_token, order.end_token
        layout = replace(self._layout, heads=self._heads(order))
        try:
            pending = Pending(layout=layout, slot_bytes=self._slot_bytes, first_token=first, end_token=end)
        except ValueError as error:
            failure = KVTransferError(str(error), transfer_id=order.transfer_id, peer=self._peer, phase="open")
            self.ended.append(Ended(transfer_id=order.transfer_id, outcome=failure))
            return
        transfer = Outgoing(order=order, pending=pending, answer_s=now_s + self._timers.answer_s)
        self._transfers[order.transfer_id] = transfer
        self._reserve(transfer, now_s)

    def ready(self, transfer_id: TransferId, layers: tuple[int, int], tokens: tuple[int, int], now_s: float) -> None:
        transfer = self._live(transfer_id)
        if transfer is None:
            return
        try:
            transfer.pending.add(*layers, *tokens)
        except ValueError as error:
            self._fail(transfer, transfer.defect(self._peer, str(error)), now_s)
            return
        self._turns[transfer_id] = None

    def finish(self, transfer_id: TransferId, first: FirstToken | None, now_s: float) -> None:
        transfer = self._live(transfer_id)
        if transfer is None or transfer.finished:
            return
        if not transfer.pending.complete:
            self._fail(
                transfer, transfer.defect(self._peer, "finish before all layers and positions were ready"), now_s
            )
            return
        transfer.finished, transfer.first, transfer.finish_s = True, first, now_s
        if transfer.state is SendState.PREFILLING:
            transfer.advance(SendState.SENDING)
        self._turns[transfer_id] = None
        self._perhaps_sent(transfer, now_s)

    def abort(self, transfer_id: TransferId, error: BatonError, now_s: float) -> None:
        """The owner gives up. `ended` follows when the peer has drained."""
        transfer = self._live(transfer_id)
        if transfer is not None:
            transfer.verdict = error
            self._say_abort(transfer, error, now_s)

    def lose(self, error: KVTransferError) -> None:
        """The link is over: every transfer ends with `error`."""
        for transfer_id, transfer in self._transfers.items():
            if transfer.state is not SendState.ABORTING:
                self.ended.append(Ended(transfer_id=transfer_id, outcome=transfer.about(error)))
            elif transfer.verdict is not None:
                self.ended.append(Ended(transfer_id=transfer_id, outcome=transfer.verdict))
        self._transfers.clear()
        self._turns.clear()

    # ---- chunks -------------------------------------------------------------------------------------------------
    def next_push(self) -> Push | None:
        """The next chunk, if there is a credit for it."""
        while self._turns and len(self._credits):
            transfer_id = self._next_turn()
            del self._turns[transfer_id]
            transfer = self._live(transfer_id)
            if transfer is None or transfer.state not in (SendState.PREFILLING, SendState.SENDING):
                continue
            push = self._carve(transfer)
            if push is not None:
                self._turns[transfer_id] = None  # to the end of the line
                self._pushes += 1
                return push
        return None

    def _next_turn(self) -> TransferId:
        longest = next(iter(self._turns))
        if len(self._turns) == 1 or self._pushes % FAIR_TURN == FAIR_TURN - 1:
            return longest
        finished = [transfer_id for transfer_id in self._turns if self._transfers[transfer_id].finished]
        return min(finished, key=lambda each: self._transfers[each].left_cells, default=longest)

    def _carve(self, transfer: Outgoing) -> Push | None:
        if transfer.again:
            sequence = transfer.again.popleft()
            block = transfer.blocks[sequence]
            transfer.resends += 1
        else:
            taken = transfer.pending.take()
            if taken is None:
                return None
            sequence, block = len(transfer.blocks), taken
            transfer.blocks.append(block)
            transfer.bytes += block.bytes(self._layout)
        slot = self._credits.take()
        assert slot is not None, "next_push looked"
        order = transfer.order
        self._flying[slot.index] = order.transfer_id
        chunk = Chunk(
            transfer_id=order.transfer_id,
            sequence=sequence,
            slot=slot,
            bytes=block.bytes(self._layout),
            **block._asdict(),
        )
        first_head = order.heads[0] if order.heads else 0
        return Push(order, block.moved(first_head), PeerMessage(chunk=chunk))

    def pushed(self, push: Push, now_s: float) -> None:
        """The chunk and its header are out. Several may be under way at once, and end in any order."""
        del self._flying[push.chunk.slot.index]
        self._progress_s = now_s
        transfer = self._live(push.order.transfer_id)
        if transfer is None:
            return
        if transfer.first_chunk_s is None:
            transfer.first_chunk_s = now_s
        transfer.last_chunk_s = now_s
        self._perhaps_sent(transfer, now_s)

    def unpushed(self, push: Push) -> None:
        """The gate was closed before anything was written: the owner's abort is on its way here."""
        del self._flying[push.chunk.slot.index]
        self._credits.put_back(push.chunk.slot)

    def _perhaps_sent(self, transfer: Outgoing, now_s: float) -> None:
        flying = transfer.order.transfer_id in self._flying.values()
        nothing_left = transfer.pending.empty and not transfer.again and not flying
        if transfer.state is SendState.SENDING and transfer.finished and nothing_left:
            transfer.advance(SendState.SENT)
            transfer.answer_s = now_s + self._timers.answer_s
            self._say_sent(transfer, now_s)

    # ---- messages -----------------------------------------------------------------------------------------------
    def receive(self, message: PeerMessage, now_s: float) -> None:
        """Raises WireError when the peer breaks the protocol; then the link must be cut."""
        match message.WhichOneof("kind"):
            case "granted":
                self._on_granted(TransferId(message.granted.transfer_id), now_s)
            case "credit":
                if self._credits.add(message.credit.slots):
                    self._progress_s = now_s
            case "resend":
                self._on_resend(message.resend, now_s)
            case "commit":
                self._on_commit(TransferId(message.commit.transfer_id), now_s)
            case "abort":
                self._on_abort(message.abort)
            case "drained":
                self._on_drained(TransferId(message.drained.transfer_id))
            case "alive":
                for name in message.alive.transfer_ids:
                    transfer = self._transfers.get(TransferId(name))
                    if transfer is not None and transfer.state is not SendState.QUEUED:
                        transfer.lease_s = now_s + self._timers.lease_s
            case kind:
                raise WireError(f"a receiver may not send {kind or 'an empty message'}", peer=self._peer)

    def _on_granted(self, transfer_id: TransferId, now_s: float) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not SendState.QUEUED:
            return
        transfer.advance(SendState.SENDING if transfer.finished else SendState.PREFILLING)
        transfer.lease_s = now_s + self._timers.lease_s
        transfer.answer_s = transfer.repeat_s = float("inf")
        self._turns[transfer_id] = None
        self._perhaps_sent(transfer, now_s)

    def _on_resend(self, resend: Resend, now_s: float) -> None:
        transfer = self._transfers.get(TransferId(resend.transfer_id))
        if transfer is None or transfer.state is not SendState.SENT or resend.round != transfer.round + 1:
            return
        if not resend.sequences or max(resend.sequences) >= len(transfer.blocks):
            raise WireError("Resend names a chunk that was never sent", peer=self._peer)
        transfer.round = resend.round
        transfer.again.extend(sorted(set(resend.sequences)))
        transfer.advance(SendState.SENDING)
        transfer.answer_s = transfer.repeat_s = float("inf")
        self._turns[transfer.order.transfer_id] = None

    def _on_commit(self, transfer_id: TransferId, now_s: float) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return
        sent = transfer.state is SendState.SENT or (transfer.state is SendState.SENDING and transfer.round > 0)
        if not sent and transfer.state is not SendState.ABORTING:
            raise WireError("Commit before Sent", peer=self._peer)
        if transfer.state is not SendState.ABORTING or transfer.verdict is not None:
            receipt = transfer.receipt(self._peer, self._wire, now_s)
            self.ended.append(Ended(transfer_id=transfer_id, outcome=receipt))
        transfer.advance(SendState.RELEASED)
        self._forget(transfer)

    def _on_abort(self, abort: PeerAbort) -> None:
        transfer_id = TransferId(abort.transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            if transfer.state is not SendState.ABORTING:
                phase = transfer.state.value
                error = from_wire(abort.error, transfer_id=transfer_id, peer=self._peer, phase=phase)
                self.ended.append(Ended(transfer_id=transfer_id, outcome=error))
            elif transfer.verdict is not None:
                self.ended.append(Ended(transfer_id=transfer_id, outcome=transfer.verdict))
            transfer.advance(SendState.DRAINED)
            self._forget(transfer)
        self._say(PeerMessage(drained=Drained(transfer_id=transfer_id)))

    def _on_drained(self, transfer_id: TransferId) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.state is SendState.ABORTING:
            self._drained(transfer)

    def _drained(self, transfer: Outgoing) -> None:
        if transfer.verdict is not None:
            self.ended.append(Ended(transfer_id=transfer.order.transfer_id, outcome=transfer.verdict))
        transfer.advance(SendState.DRAINED)
        self._forget(transfer)

    # ---- time ---------------------------------------------------------------------------------------------------
    def tick(self, now_s: float) -> None:
        """Call about every Timers.tick_s while transfers are held, else every Timers.alive_s."""
        if now_s >= self._alive_s:
            self._alive_s = now_s + self._timers.alive_s
            held = [t.order.transfer_id for t in self._transfers.values() if t.state is not SendState.ABORTING]
            # a slot that is still being written must not be credited anew: the old write would hit the next chunk
            missed = [slot for slot in self._credits.missed() if slot.index not in self._flying]
            self._say(PeerMessage(alive=Alive(transfer_ids=held, slots=missed)))
        for transfer in list(self._transfers.values()):
            self._tick(transfer, now_s)

    def _tick(self, transfer: Outgoing, now_s: float) -> None:
        state = transfer.state
        if state is SendState.ABORTING:
            if now_s >= transfer.answer_s:
                self._drained(transfer)
                return
        elif now_s >= transfer.order.deadline_s:
            self._fail(transfer, transfer.late(self._peer, "deadline of the transfer", ErrorKind.DEADLINE), now_s)
        elif now_s >= transfer.lease_s:
            self._fail(transfer, transfer.late(self._peer, "the peer no longer names the transfer"), now_s)
        elif now_s >= transfer.answer_s:
            self._fail(transfer, transfer.late(self._peer, "no answer"), now_s)
        elif self._starves(transfer, now_s):
            self._fail(transfer, transfer.late(self._peer, "no slot became free"), now_s)
        elif now_s >= transfer.repeat_s:
            if state is SendState.QUEUED:
                self._reserve(transfer, now_s)
            elif state is SendState.SENT:
                self._say_sent(transfer, now_s)
        if transfer.state is SendState.ABORTING and now_s >= transfer.repeat_s:
            error = transfer.verdict or KVTransferError("aborted")
            self._repeat_abort(transfer, error, now_s)

    def _starves(self, transfer: Outgoing, now_s: float) -> bool:
        if len(self._credits) or transfer.order.transfer_id not in self._turns:
            return False
        return now_s - self._progress_s >= self._timers.answer_s

    # ---- helpers ------------------------------------------------------------------------------------------------
    def _live(self, transfer_id: TransferId) -> Outgoing | None:
        transfer = self._transfers.get(transfer_id)
        return None if transfer is None or transfer.state is SendState.ABORTING else transfer

    def _forget(self, transfer: Outgoing) -> None:
        del self._transfers[transfer.order.transfer_id]
        self._turns.pop(transfer.order.transfer_id, None)

    def _fail(self, transfer: Outgoing, error: BatonError, now_s: float) -> None:
        """We give up. In SENT the peer may have committed: the verdict waits for its last word."""
        if transfer.state is SendState.SENT:
            transfer.verdict = error
        else:
            self.ended.append(Ended(transfer_id=transfer.order.transfer_id, outcome=error))
        self._say_abort(transfer, error, now_s)

    def _say_abort(self, transfer: Outgoing, error: BatonError, now_s: float) -> None:
        transfer.advance(SendState.ABORTING)
        transfer.answer_s = now_s + self._timers.answer_s
        transfer.again.clear()
        self._repeat_abort(transfer, error, now_s)

    def _repeat_abort(self, transfer: Outgoing, error: BatonError, now_s: float) -> None:
        transfer.repeat_s = now_s + self._timers.alive_s
        transfer_id = transfer.order.transfer_id
        self._say(PeerMessage(abort=PeerAbort(transfer_id=transfer_id, error=to_wire(error))))

    def _reserve(self, transfer: Outgoing, now_s: float) -> None:
        transfer.repeat_s = now_s + self._timers.alive_s
        order = transfer.order
        reserve = Reserve(
            transfer_id=order.transfer_id,
            request_id=order.request_id,
            first_token=order.first_token,
            end_token=order.end_token,
            heads=self._heads(order),
        )
        self._say(PeerMessage(reserve=reserve))

    def _heads(self, order: Outbound) -> int:
        return order.heads[1] - order.heads[0] if order.heads else self._layout.heads

    def _say_sent(self, transfer: Outgoing, now_s: float) -> None:
        transfer.repeat_s = now_s + self._timers.alive_s
        sent = Sent(
            transfer_id=transfer.order.transfer_id,
            chunks=len(transfer.blocks),
            bytes=transfer.bytes,
            first=None if transfer.first is None else first_to_wire(transfer.first),
            round=transfer.round,
        )
        self._say(PeerMessage(sent=sent))

    def _say(self, message: PeerMessage) -> None:
        self.messages.append(message)
