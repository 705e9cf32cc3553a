"""One transfer on the sending side: its state and what can be said about it. Owned by `sending.Sender`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from baton_common.errors import BatonError, ErrorKind
from baton_kvtransfer.errors import DeadlineExceeded, KVTransferError
from baton_kvtransfer.plan import Block, Pending
from baton_kvtransfer.protocol import SEND_EDGES, SendState
from baton_kvtransfer.records import FirstToken, Outbound, Receipt

NEVER_S = float("inf")


@dataclass(slots=True, kw_only=True)
class Outgoing:
    order: Outbound
    pending: Pending
    state: SendState = SendState.QUEUED
    blocks: list[Block] = field(default_factory=list)  # by sequence number
    again: deque[int] = field(default_factory=deque)  # sequence numbers to resend
    round: int = 0
    finished: bool = False  # everything was announced
    first: FirstToken | None = None  # None: nothing was sampled, the receiver computes on
    verdict: BatonError | None = None  # to be told once the peer has spoken its last word
    lease_s: float = NEVER_S
    answer_s: float = NEVER_S
    repeat_s: float = NEVER_S
    bytes: int = 0
    resends: int = 0
    first_chunk_s: float | None = None
    last_chunk_s: float = 0.0
    finish_s: float = 0.0

    def advance(self, to: SendState) -> None:
        assert to in SEND_EDGES[self.state], f"{self.order.transfer_id}: {self.state.value} -> {to.value}"
        self.state = to

    @property
    def left_cells(self) -> int:
        """Announced, or to be sent again, and not under way yet."""
        return self.pending.left_cells + sum(self.blocks[sequence].cells for sequence in self.again)

    def receipt(self, peer: str, wire: str, now_s: float) -> Receipt:
        begin_s = self.finish_s if self.first_chunk_s is None else self.first_chunk_s
        return Receipt(
            transfer_id=self.order.transfer_id,
            peer=peer,
            wire=wire,
            bytes=self.bytes,
            chunks=len(self.blocks),
            resends=self.resends,
            first_chunk_s=begin_s,
            last_chunk_s=max(begin_s, self.last_chunk_s),
            finish_s=self.finish_s,
            commit_s=now_s,
        )

    def about(self, error: KVTransferError) -> KVTransferError:
        """The link's error, told of this transfer."""
        return error.about(self.order.transfer_id, self.order.request_id, self.state.value)

    def late(self, peer: str, what: str, kind: ErrorKind = ErrorKind.TRANSFER) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"transfer {self.order.transfer_id} to {peer}: {what} ({self.state.value})",
            transfer_id=self.order.transfer_id,
            peer=peer,
            phase=self.state.value,
            kind=kind,
        )

    def defect(self, peer: str, what: str) -> KVTransferError:
        return KVTransferError(
            f"transfer {self.order.transfer_id}: {what}",
            transfer_id=self.order.transfer_id,
            peer=peer,
            phase=self.state.value,
            kind=ErrorKind.INTERNAL,
        )
