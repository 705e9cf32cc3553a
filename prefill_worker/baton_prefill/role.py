"""The prefill role: computes prompts and token #1, and hands the KV to the decode worker named in the ticket.

Threads: hooks come from the engine thread, `on_layers` from the device thread, `_over` from transfer threads, `accept`
from the event loop; everything is passed on at once. Invariant: KV is announced only after it is in the pool, and no
gather on a request's pages starts after `release_kv`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

from baton_common.errors import Aborted, BatonError, InvalidRequest
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_engine.request import Mode, Request
from baton_engine.role import Fence, TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer.records import FirstToken, InboundEvents, Outbound, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.convert import check_compat
from baton_worker.filling import Filler
from baton_worker.handoff import as_transfer_error
from baton_worker.outbox import Ended, KvChanged, Outbox, StepTokens
from baton_worker.ports import AllDone, DoneFence, EnginePort, OutboundTransfer, TransferPort
from baton_worker.storage import Storage

log = logging.getLogger("baton.prefill")


class PrefillRole:
    """Binds the engine's hooks to the outbox and to the transfer endpoint."""

    def __init__(self, *, outbox: Outbox) -> None:
        self._outbox = outbox
        self._engine: EnginePort | None = None
        self._endpoint: TransferPort | None = None
        self._storage: Storage | None = None
        self._filler: Filler | None = None
        self._compat = common_pb2.Compat()
        self._tickets: dict[RequestId, worker_pb2.Ticket] = {}  # from accept to on_ended
        self._transfers: dict[RequestId, OutboundTransfer] = {}  # from admission to release_kv
        self._lock = threading.Lock()
        self._ended_transfers = 0

    # ---- shell ------------------------------------------------------------------------------------------------------
    @property
    def inbound(self) -> InboundEvents:
        return _NothingExpected()

    def bind(
        self,
        *,
        engine: EnginePort,
        endpoint: TransferPort | None,
        compat: common_pb2.Compat,
        storage: Storage | None = None,
    ) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._storage = storage
        sources = [] if storage is None else [storage.source()]
        self._filler = Filler(engine=engine, sources=sources, page_tokens=compat.page_tokens)
        self._compat = compat

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        """Refuses what could not be handed over, before anything is computed: Incompatible names the field."""
        if request.mode is not Mode.PREFILL:
            raise InvalidRequest("this worker prefills; send LOCAL and RESERVE to a decode worker", param="mode")
        ticket = submit.ticket
        if not ticket.transfer_id or not ticket.peer_address:
            raise InvalidRequest("PREFILL needs the ticket of a decode worker", param="ticket")
        check_compat(self._compat, ticket.compat)
        first = ticket.first_missing_token
        if first % self._compat.page_tokens or first >= len(request.tokens):
            raise InvalidRequest(
                f"first_missing_token {first} is no page border inside {len(request.tokens)} tokens", param="ticket"
            )
        request.transfer_id = TransferId(ticket.transfer_id)
        request.send_from_token = first
        self._tickets[request.request_id] = ticket

    def handoffs(self) -> int:
        return self._ended_transfers

    # ---- engine thread ----------------------------------------------------------------------------------------------
    def wants_fill(self, request: Request) -> bool:
        return self._filler is not None and self._filler.wants(request)

    def on_fill(
        self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int
    ) -> None:
        assert self._filler is not None
        self._filler.begin(request, pages, hashes, have_tokens)

    def wants_pages(self) -> bool:
        return self._storage is not None

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        return None if self._storage is None else self._storage.keep_pages(hashes, pages)

    def unsent_tokens(self) -> int:
        return sum(transfer.unsent_tokens for transfer in self._transfers.values())

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        raise AssertionError("`accept` refuses RESERVE")

    def on_local(self, request: Request) -> None:
        raise AssertionError("`accept` refuses RESERVE")

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        assert self._endpoint is not None
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

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """Device thread. Rows whose transfer is over are passed by: nobody waits for them."""
        for work in plan.work:
            transfer = self._transfers.get(work.request_id)
            if transfer is not None:
                transfer.ready(layer_begin, layer_end, work.start, work.start + work.count)

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
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

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self._outbox.put(StepTokens(step=step, tokens=tuple(tokens)))

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        filled: Fence = DoneFence() if self._filler is None else self._filler.stop(request.request_id)
        transfer = self._transfers.pop(request.request_id, None)
        if transfer is None:
            return filled
        sent = transfer.abort(error or Aborted("the request is over", request_id=request.request_id))
        return AllDone(filled, sent)

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        self._outbox.put(KvChanged(stored=tuple(stored), removed=tuple(removed)))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        if self._storage is not None and error is None:
            self._storage.keep_session(request)
        self._tickets.pop(request.request_id, None)
        self._outbox.put(Ended(request_id=request.request_id, error=error))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def _over(self, request_id: RequestId, outcome: Receipt | BatonError) -> None:
        with self._lock:
            self._ended_transfers += 1
        if self._engine is None:
            return
        if isinstance(outcome, BatonError):
            log.warning("handoff failed", extra={"request": request_id, "error": str(outcome)})
            self._engine.handoff_failed(request_id, as_transfer_error(outcome, request_id))
        else:
            log.debug(
                "KV handed over",
                extra={
                    "request": request_id,
                    "bytes": outcome.bytes,
                    "wire": outcome.wire,
                    "to": outcome.peer,
                    "exposed_ms": round(outcome.exposed_s * 1000, 3),
                },
            )
            self._engine.handoff_done(request_id)


class _NothingExpected:
    """A prefill worker never calls `expect`, so its endpoint refuses every incoming transfer by itself."""

    def on_receiving(self, transfer_id: TransferId) -> None:
        log.error("KV arrives at a prefill worker", extra={"transfer": transfer_id})

    def on_received(self, transfer_id: TransferId, first: FirstToken, receipt: Receipt) -> None:
        log.error("KV arrived at a prefill worker", extra={"transfer": transfer_id})

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        log.error("a transfer to a prefill worker failed", extra={"transfer": transfer_id, "error": str(error)})
