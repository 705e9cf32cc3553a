"""The sending side of PREFILL, for both roles: from the ticket of a decode worker to its commit.

A prefill worker computes the prompt first; a decode worker that drains has nearly all of it in its prefix tree.
Threads: `accept` on the event loop, `layers` on the device thread, `_over` on transfer threads, all else on the engine
thread; nothing blocks. Invariant: KV is announced only after it is in the pool, and no gather on a request's pages
starts after `release`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

from baton_common.errors import Aborted, BatonError, ErrorKind, InvalidRequest
from baton_common.ids import PageId, RequestId, TransferId
from baton_engine.request import Request
from baton_engine.role import Fence, TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer.records import FirstToken, Outbound, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.convert import check_compat
from baton_worker.outbox import KvMoved, Outbox
from baton_worker.ports import DoneFence, EnginePort, OutboundTransfer, TransferPort

log = logging.getLogger("baton.worker")


def as_transfer_error(error: BatonError, request_id: RequestId) -> BatonError:
    """That somebody asked the other side for the end is no wish of our router: to it the handoff failed, try again."""
    if error.kind is not ErrorKind.ABORTED:
        return error
    return BatonError(error.message, kind=ErrorKind.TRANSFER, request_id=request_id)


class Handoffs:
    """Every PREFILL request of this worker, from `accept` to `forget`."""

    def __init__(
        self, *, engine: EnginePort, endpoint: TransferPort, compat: common_pb2.Compat, outbox: Outbox
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._endpoint = endpoint
        self._compat = compat
        self._tickets: dict[RequestId, worker_pb2.Ticket] = {}  # from accept to forget
        self._transfers: dict[RequestId, OutboundTransfer] = {}  # from admission to release
        self._lock = threading.Lock()
        self._ended = 0

    @property
    def ended(self) -> int:
        """Transfers that are over, since the start."""
        return self._ended

    def ticket(self, request_id: RequestId) -> worker_pb2.Ticket | None:
        return self._tickets.get(request_id)

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        """Refuses what could not be handed over, before anything is computed: Incompatible names the field."""
        ticket = submit.ticket
        if not ticket.transfer_id or not ticket.peer_address:
            raise InvalidRequest("PREFILL needs the ticket of a decode worker", param="ticket")
        check_compat(self._compat, ticket.compat)
        first, page = ticket.first_missing_token, max(ticket.compat.page_tokens, 1)
        if first % page or first >= len(request.tokens):
            raise InvalidRequest(
                f"first_missing_token {first} is no page border inside {len(request.tokens)} tokens", param="ticket"
            )
        request.transfer_id = TransferId(ticket.transfer_id)
        request.send_from_token = first
        self._tickets[request.request_id] = ticket

    def forget(self, request_id: RequestId) -> None:
        """The request owns nothing any more; also for one that was never accepted here."""
        self._tickets.pop(request_id, None)

    # ---- engine thread ----------------------------------------------------------------------------------------------
    @property
    def unsent_tokens(self) -> int:
        """As `Role.unsent_tokens`."""
        return sum(transfer.unsent_tokens for transfer in self._transfers.values())

    def admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        """As `Role.on_prefill_admitted`."""
        ticket = self._tickets[request.request_id]
        transfer = self._endpoint.open(
            Outbound(
                transfer_id=TransferId(ticket.transfer_id),
                request_id=request.request_id,
                peer_address=ticket.peer_address,
                peer_incarnation=ticket.incarnation,
                pages=tuple(pages),
                first_token=request.send_from_token,
                end_token=len(request.tokens),
                deadline_s=request.deadline_s,
                done=partial(self._over, request.request_id),
            )
        )
        if computed_tokens > request.send_from_token:
            transfer.ready(0, self._compat.layers, request.send_from_token, computed_tokens)
        self._transfers[request.request_id] = transfer

    def layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """As `Role.on_layers`. Rows whose transfer is over are passed by: nobody waits for them."""
        for work in plan.work:
            transfer = self._transfers.get(work.request_id)
            if transfer is not None:
                transfer.ready(layer_begin, layer_end, work.start, work.start + work.count)

    def done(self, request: Request, first: TokenOut) -> None:
        """As `Role.on_prefill_done`."""
        transfer = self._transfers.get(request.request_id)
        if transfer is None:
            return
        logprobs = first.logprobs
        transfer.finish(
            FirstToken(
                token_id=first.token_id,
                position=first.position,
                logprob=None if logprobs is None else logprobs.logprob,
                top=() if logprobs is None else logprobs.top,
            )
        )

    def release(self, request: Request, error: BatonError | None) -> Fence:
        """As `Role.release_kv`; also for a request that was not admitted yet."""
        transfer = self._transfers.pop(request.request_id, None)
        if transfer is None:
            return DoneFence()
        return transfer.abort(error or Aborted("the request is over", request_id=request.request_id))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def _over(self, request_id: RequestId, outcome: Receipt | BatonError) -> None:
        with self._lock:
            self._ended += 1
        if isinstance(outcome, BatonError):
            log.warning("handoff failed", extra={"request": request_id, "error": str(outcome)})
            self._engine.handoff_failed(request_id, as_transfer_error(outcome, request_id))
            return
        fields = {
            "request": request_id,
            "bytes": outcome.bytes,
            "wire": outcome.wire,
            "to": outcome.peer,
            "exposed_ms": round(outcome.exposed_s * 1000, 3),
        }
        log.debug("KV handed over", extra=fields)
        self._outbox.put(KvMoved(request_id=request_id, what="handoff", sent=True, receipt=outcome), wake=False)
        self._engine.handoff_done(request_id)
