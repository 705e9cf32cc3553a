"""Pulls: KV that a peer holds is asked for over the link on which we send to it, and comes back as its own transfer.

The one who asks expects the transfer first; until a Reserve claims it, a refusal, the loss of the link that carried the
question, or the deadline ends it. Once it is claimed the link that brings it decides alone.
Pure but for `Expectations`; it does not know threads, sockets or who holds which pages.
"""

from __future__ import annotations

from collections.abc import Callable

from baton_common.errors import BatonError, ErrorKind
from baton_common.hashing import HASH_BYTES
from baton_common.ids import PageHash, TransferId
from baton_kvtransfer.errors import KVTransferError, PullDenied, from_wire, to_wire
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.records import Inbound, Pull, PullOrder
from baton_proto.peer_pb2 import PeerMessage, PullRefused
from baton_proto.peer_pb2 import Pull as PullMessage

_LONGEST_NAME = 1024
"""Of a transfer, ticket or address, characters; what we make is a tenth of it."""

Fail = Callable[[Inbound, BatonError], None]


def question(pull: Pull, *, address: str, incarnation: str, page_tokens: int) -> PeerMessage:
    """`address` and `incarnation` are ours: where the peer sends the KV."""
    return PeerMessage(
        pull=PullMessage(
            transfer_id=pull.transfer_id,
            ticket=pull.ticket,
            first_token=pull.first_token,
            end_token=pull.end_token,
            page_hash=pull.page_hash,
            page_tokens=page_tokens,
            peer_address=address,
            incarnation=incarnation,
        )
    )


def refusal(transfer_id: str, error: BatonError) -> PeerMessage:
    return PeerMessage(pull_refused=PullRefused(transfer_id=transfer_id, error=to_wire(error)))


def order_from(message: PullMessage, *, peer: str, incarnation: str, refuse: Callable[[BatonError], None]) -> PullOrder:
    """What the peer of a link asks, checked as far as it goes without its pages. Raises PullDenied, kind INVALID."""
    objection = _objection(message, incarnation)
    if objection:
        raise PullDenied(objection, transfer_id=message.transfer_id, peer=peer, phase="pull", kind=ErrorKind.INVALID)
    return PullOrder(
        transfer_id=TransferId(message.transfer_id),
        ticket=TransferId(message.ticket),
        first_token=message.first_token,
        end_token=message.end_token,
        page_hash=PageHash(message.page_hash),
        page_tokens=message.page_tokens,
        peer=peer,
        peer_address=message.peer_address,
        peer_incarnation=message.incarnation,
        refuse=refuse,
    )


def _objection(message: PullMessage, incarnation: str) -> str:
    first, end, page = message.first_token, message.end_token, message.page_tokens
    for name in ("transfer_id", "ticket", "peer_address"):
        if not 0 < len(getattr(message, name)) <= _LONGEST_NAME:
            return f"Pull.{name} must have 1 to {_LONGEST_NAME} characters"
    if message.incarnation != incarnation:
        return f"Pull.incarnation is {message.incarnation[:64]!r}, this link belongs to {incarnation!r}"
    if page < 1 or first % page or end % page or not first < end:
        return f"positions [{first}, {end}) are no whole pages of {page} tokens"
    if len(message.page_hash) != HASH_BYTES:
        return f"Pull.page_hash has {len(message.page_hash)} bytes, a page hash has {HASH_BYTES}"
    return ""


class Asked:
    """What was asked of one peer and has not begun to come. Belongs to the thread of its link."""

    def __init__(self, expected: Expectations, fail: Fail) -> None:
        """`fail` tells the owner of an expectation that it is over."""
        self._expected = expected
        self._fail = fail
        self._pulls: set[TransferId] = set()

    def __len__(self) -> int:
        return len(self._pulls)

    def add(self, transfer_id: TransferId) -> None:
        self._pulls.add(transfer_id)

    def refused(self, answer: PullRefused, peer: str) -> None:
        """Only what was asked here may be refused here."""
        transfer_id = TransferId(answer.transfer_id)
        if transfer_id in self._pulls:
            said = from_wire(answer.error, transfer_id=transfer_id, peer=peer, phase="pull")
            text = f"peer {peer} refused the pull: {answer.error.message}"
            self._end(transfer_id, PullDenied(text, peer=peer, kind=said.kind, param=said.param))

    def lose(self, error: KVTransferError) -> None:
        """The link is over: what it asked for will not come."""
        for transfer_id in list(self._pulls):
            self._end(transfer_id, error)

    def sweep(self) -> None:
        """Forget what came, began to come, was cancelled or is overdue. Call now and then."""
        self._pulls = {transfer_id for transfer_id in self._pulls if self._expected.awaits(transfer_id)}

    def _end(self, transfer_id: TransferId, error: KVTransferError) -> None:
        self._pulls.discard(transfer_id)
        inbound = self._expected.end_unclaimed(transfer_id)
        if inbound is not None:
            self._fail(inbound, error.about(transfer_id, inbound.request_id, "pull"))
