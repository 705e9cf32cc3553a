"""One transfer on the receiving side: its state and what arrived. Owned by `receiving.Receiver`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from baton_common.errors import BatonError, ErrorKind
from baton_kvtransfer.errors import DeadlineExceeded, KVTransferError, WireError
from baton_kvtransfer.plan import Coverage
from baton_kvtransfer.protocol import RECEIVE_EDGES, ReceiveState
from baton_kvtransfer.records import Inbound, Receipt
from baton_proto.peer_pb2 import Sent

NEVER_S = float("inf")
_MISSING_AT_ONCE = 4096


@dataclass(slots=True, kw_only=True)
class Incoming:
    inbound: Inbound
    coverage: Coverage
    lease_s: float
    state: ReceiveState = ReceiveState.NEW
    verified: set[int] = field(default_factory=set)  # sequence numbers
    round: int = 0  # of resending, the latest asked for
    resends: int = 0
    error: BatonError | None = None  # why we abort
    answer_s: float = NEVER_S
    repeat_s: float = NEVER_S
    bytes: int = 0
    first_chunk_s: float | None = None
    last_chunk_s: float = 0.0

    def advance(self, to: ReceiveState) -> None:
        assert to in RECEIVE_EDGES[self.state], f"{self.inbound.transfer_id}: {self.state.value} -> {to.value}"
        self.state = to

    def missing(self, sent: Sent) -> list[int]:
        """Chunks that the peer counts and we do not have; bounded, so that a wild count costs nothing."""
        return list(islice((i for i in range(sent.chunks) if i not in self.verified), _MISSING_AT_ONCE))

    def objection(self, sent: Sent) -> str:
        """Why what arrived is not the whole transfer, though no chunk is missing; "" when it is."""
        if len(self.verified) != sent.chunks or self.bytes != sent.bytes:
            return (
                f"{len(self.verified)} chunks of {self.bytes} bytes arrived, the peer counts {sent.chunks}/{sent.bytes}"
            )
        return "" if self.coverage.complete else "the chunks do not cover the whole range"

    def receipt(self, peer: str, wire: str, now_s: float) -> Receipt:
        begin_s = now_s if self.first_chunk_s is None else self.first_chunk_s
        return Receipt(
            transfer_id=self.inbound.transfer_id,
            peer=peer,
            wire=wire,
            bytes=self.bytes,
            chunks=len(self.verified),
            resends=self.resends,
            first_chunk_s=begin_s,
            last_chunk_s=max(begin_s, self.last_chunk_s),
            finish_s=now_s,
            commit_s=now_s,
        )

    def about(self, error: KVTransferError) -> KVTransferError:
        """The link's error, told of this transfer."""
        return error.about(self.inbound.transfer_id, self.inbound.request_id, self.state.value)

    def late(self, peer: str, what: str, kind: ErrorKind = ErrorKind.TRANSFER) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"transfer {self.inbound.transfer_id} from {peer}: {what} ({self.state.value})",
            transfer_id=self.inbound.transfer_id,
            peer=peer,
            phase=self.state.value,
            kind=kind,
        )

    def broken(self, peer: str, what: str) -> WireError:
        return WireError(
            f"transfer {self.inbound.transfer_id} from {peer}: {what}",
            transfer_id=self.inbound.transfer_id,
            peer=peer,
            phase=self.state.value,
        )
