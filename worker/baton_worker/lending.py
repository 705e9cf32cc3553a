"""KV that a decode worker holds for its reservations, sent back to the prefill worker that was given the ticket.

A ticket is good for one pull: reservations are bounded, so pulls are. Pages stay leased until the reservation ends;
`withdraw` then says when the last gather is over. A pull must name the very tokens, by hash, on its own page size.
Threads: `offer` and `withdraw` on the engine thread, `on_pull` and `_over` on transfer threads; nothing blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError, ErrorKind
from baton_common.hashing import chain_root, page_hashes, salted_root
from baton_common.ids import PageId, TransferId
from baton_engine.request import Request
from baton_engine.role import Fence
from baton_kvtransfer.errors import PullDenied
from baton_kvtransfer.records import Outbound, PullOrder, Receipt
from baton_proto import common_pb2
from baton_worker.outbox import KvMoved, Outbox
from baton_worker.ports import DoneFence, OutboundTransfer, TransferPort

log = logging.getLogger("baton.worker")


@dataclass(slots=True, kw_only=True)
class _Loan:
    """One reservation. `pull`: the one that its ticket was used for."""

    request: Request
    pages: tuple[PageId, ...]
    tokens: int  # KV of [0, tokens) is in the pages
    pull: TransferId | None = None
    transfer: OutboundTransfer | None = None


class Lender:
    def __init__(self, *, endpoint: TransferPort, compat: common_pb2.Compat, outbox: Outbox) -> None:
        self._endpoint = endpoint
        self._outbox = outbox
        self._layers = compat.layers
        self._root = chain_root(compat.model_digest, compat.weights_epoch)
        self._lock = threading.Lock()
        self._loans: dict[TransferId, _Loan] = {}

    def offer(self, ticket: TransferId, request: Request, pages: Sequence[PageId], tokens: int) -> None:
        """A reservation whose ticket leaves now; its first `tokens` are in the pages."""
        with self._lock:
            self._loans[ticket] = _Loan(request=request, pages=tuple(pages), tokens=tokens)

    def withdraw(self, ticket: TransferId, error: BatonError) -> Fence:
        """The reservation is over: no gather starts after this. Idempotent; also for a ticket that never was."""
        with self._lock:
            loan = self._loans.pop(ticket, None)
        return DoneFence() if loan is None or loan.transfer is None else loan.transfer.abort(error)

    def on_pull(self, order: PullOrder) -> None:
        """As `InboundEvents.on_pull`."""
        with self._lock:
            loan = self._loans.get(order.ticket)
            if loan is not None and loan.pull == order.transfer_id:
                return  # said twice
            objection = _objection(loan, order)
            if loan is not None and not objection:
                loan.pull = order.transfer_id
        if loan is None or objection:
            self._refuse(order, objection, ErrorKind.ABORTED if loan is None else ErrorKind.INVALID)
        elif not self._same_tokens(loan.request, order):
            self._refuse(order, "page_hash names other tokens than the reservation", ErrorKind.INVALID)
        else:
            self._send(loan, order)

    def _same_tokens(self, request: Request, order: PullOrder) -> bool:
        root = salted_root(self._root, request.cache_salt)
        return page_hashes(root, request.tokens[: order.end_token], order.page_tokens)[-1] == order.page_hash

    def _send(self, loan: _Loan, order: PullOrder) -> None:
        def over(outcome: Receipt | BatonError) -> None:
            if isinstance(outcome, BatonError):
                log.info("KV was not pulled", extra={"by": order.peer, "why": str(outcome)})
                order.refuse(outcome)  # it may still wait for the first byte
            else:
                log.debug("KV pulled", extra={"by": order.peer, "bytes": outcome.bytes, "wire": outcome.wire})
                moved = KvMoved(request_id=loan.request.request_id, what="pull", sent=True, receipt=outcome)
                self._outbox.put(moved, wake=False)

        outbound = Outbound(
            transfer_id=order.transfer_id,
            request_id=loan.request.request_id,
            peer_address=order.peer_address,
            peer_incarnation=order.peer_incarnation,
            pages=loan.pages,
            first_token=order.first_token,
            end_token=order.end_token,
            deadline_s=loan.request.deadline_s,
            done=over,
        )
        with self._lock:
            gone = self._loans.get(order.ticket) is not loan
            if not gone:
                try:
                    loan.transfer = self._endpoint.open(outbound)
                except BatonError as error:  # the endpoint closes
                    order.refuse(error)
                    return
                loan.transfer.ready(0, self._layers, order.first_token, order.end_token)
                loan.transfer.finish(None)
        if gone:
            self._refuse(order, "the reservation is over", ErrorKind.ABORTED)

    def _refuse(self, order: PullOrder, why: str, kind: ErrorKind) -> None:
        log.warning("pull refused", extra={"by": order.peer, "ticket": order.ticket[:64], "why": why})
        order.refuse(PullDenied(why, transfer_id=order.transfer_id, peer=order.peer, phase="pull", kind=kind))


def _objection(loan: _Loan | None, order: PullOrder) -> str:
    if loan is None:
        return "this worker has no reservation under the ticket (over, or never made)"
    if loan.pull is not None:
        return "the ticket was used for a pull before"
    if order.end_token > loan.tokens:
        return f"positions up to {order.end_token} were asked for, KV of {loan.tokens} is here"
    return ""
