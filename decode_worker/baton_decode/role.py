"""The decode role: leases pages, hands out tickets, receives KV, streams tokens from #2 on. Colocated: no peers.

With peers it also sends: KV that a prefill worker pulls back, and, on PREFILL, the whole of a request that it decoded
itself, which moves to another decode worker.
Threads: hooks come from the engine thread, events of transfers from theirs, `accept` from the event loop; everything is
passed on at once. Invariant: a transfer is expected before its ticket leaves, and `release_kv` ends what reads or
writes the pages, so no KV is written into pages that are somebody else's, or read out of them.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence

from baton_common.errors import Aborted, BatonError, ErrorKind, InvalidRequest
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_engine.request import Mode, Request
from baton_engine.role import Fence, TokenLogprobs, TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer.errors import PullDenied
from baton_kvtransfer.records import FirstToken, Inbound, InboundEvents, PullOrder, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Filler
from baton_worker.handoff import Handoffs, as_transfer_error
from baton_worker.lending import Lender
from baton_worker.outbox import Ended, KvChanged, KvMoved, Outbox, Reserved, StepTokens
from baton_worker.ports import AllDone, DoneFence, EnginePort, TransferPort
from baton_worker.storage import Storage

log = logging.getLogger("baton.decode")


class DecodeRole:
    """Binds the engine's hooks to the outbox and, with peers, to the transfer endpoint."""

    def __init__(self, *, outbox: Outbox, incarnation: str) -> None:
        self._outbox = outbox
        self._incarnation = incarnation
        self._engine: EnginePort | None = None
        self._endpoint: TransferPort | None = None
        self._handoffs: Handoffs | None = None
        self._lender: Lender | None = None
        self._storage: Storage | None = None
        self._filler: Filler | None = None
        self._serials = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[TransferId, RequestId] = {}  # expected, and not released yet
        self._ended_transfers = 0

    # ---- shell ------------------------------------------------------------------------------------------------------
    @property
    def inbound(self) -> InboundEvents:
        return self

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
        if endpoint is not None:
            self._handoffs = Handoffs(engine=engine, endpoint=endpoint, compat=compat, outbox=self._outbox)
            self._lender = Lender(endpoint=endpoint, compat=compat, outbox=self._outbox)
        self._storage = storage
        sources = [] if storage is None else [storage.source()]
        self._filler = Filler(engine=engine, sources=sources, page_tokens=compat.page_tokens)

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        if request.mode is Mode.PREFILL:
            if self._handoffs is None:
                raise InvalidRequest("this worker has no peers to hand KV to", param="mode")
            self._handoffs.accept(submit, request)
        if request.mode is Mode.RESERVE:
            request.transfer_id = TransferId(f"{self._incarnation}-{next(self._serials)}")
            if self._endpoint is None:  # no peer will ever bring the KV: whatever is missing is computed here
                request.local_below_tokens = len(request.tokens) + 1

    def hands_over(self, submit: worker_pb2.Submit) -> bool:
        return submit.mode == worker_pb2.SUBMIT_MODE_PREFILL

    def handoffs(self) -> int:
        return self._ended_transfers + (0 if self._handoffs is None else self._handoffs.ended)

    # ---- engine thread ----------------------------------------------------------------------------------------------
    def wants_fill(self, request: Request) -> bool:
        return self._filler is not None and self._filler.wants(request)

    def on_fill(self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int) -> None:
        assert self._filler is not None
        self._filler.begin(request, pages, hashes, have_tokens)

    def wants_pages(self) -> bool:
        return self._storage is not None

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        return None if self._storage is None else self._storage.keep_pages(hashes, pages)

    def unsent_tokens(self) -> int:
        return 0 if self._handoffs is None else self._handoffs.unsent_tokens

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        assert self._endpoint is not None
        assert self._lender is not None
        assert request.transfer_id is not None
        self._lender.offer(request.transfer_id, request, pages, first_missing_token)
        with self._lock:
            self._waiting[request.transfer_id] = request.request_id
        self._endpoint.expect(
            Inbound(
                transfer_id=request.transfer_id,
                request_id=request.request_id,
                pages=tuple(pages),
                first_token=first_missing_token,
                end_token=len(request.tokens),
                deadline_s=request.deadline_s,
            )
        )
        self._outbox.put(
            Reserved(
                request_id=request.request_id,
                transfer_id=request.transfer_id,
                first_missing_token=first_missing_token,
                cached_tokens=first_missing_token,
                local=False,
            )
        )

    def on_local(self, request: Request) -> None:
        self._outbox.put(
            Reserved(
                request_id=request.request_id,
                transfer_id=request.transfer_id,
                first_missing_token=request.cached_tokens,
                cached_tokens=request.cached_tokens,
                local=True,
            )
        )

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        assert self._handoffs is not None, "`accept` refuses PREFILL"
        self._handoffs.admitted(request, pages, computed_tokens)

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """Device thread."""
        assert self._handoffs is not None, "`accept` refuses PREFILL"
        self._handoffs.layers(plan, layer_begin, layer_end)

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        assert self._handoffs is not None, "`accept` refuses PREFILL"
        self._handoffs.done(request, first)

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self._outbox.put(StepTokens(step=step, tokens=tuple(tokens)))

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        filled: Fence = DoneFence() if self._filler is None else self._filler.stop(request.request_id)
        if self._endpoint is None or request.transfer_id is None:
            return filled
        assert self._handoffs is not None
        assert self._lender is not None
        if request.mode is Mode.PREFILL:
            return AllDone(filled, self._handoffs.release(request, error))
        with self._lock:
            self._waiting.pop(request.transfer_id, None)
        over = error or Aborted("the request is over", request_id=request.request_id)
        lent = self._lender.withdraw(request.transfer_id, over)
        return AllDone(filled, lent, self._endpoint.cancel(request.transfer_id, over))

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        self._outbox.put(KvChanged(stored=tuple(stored), removed=tuple(removed)))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        if self._storage is not None and error is None:
            self._storage.keep_session(request)
        if self._handoffs is not None:
            self._handoffs.forget(request.request_id)
        self._outbox.put(Ended(request_id=request.request_id, error=error))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def on_receiving(self, transfer_id: TransferId) -> None:
        request_id = self._request(transfer_id)
        if request_id is not None and self._engine is not None:
            self._engine.kv_receiving(request_id)

    def on_pull(self, order: PullOrder) -> None:
        if self._lender is None:  # the worker is being put together
            order.refuse(PullDenied("this worker has made no reservation yet", peer=order.peer, phase="pull"))
        else:
            self._lender.on_pull(order)

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        request_id = self._request(transfer_id)
        self._count()
        log.debug(
            "KV received",
            extra={"transfer": transfer_id, "bytes": receipt.bytes, "wire": receipt.wire, "from": receipt.peer},
        )
        if request_id is None or self._engine is None:
            return
        self._outbox.put(KvMoved(request_id=request_id, what="handoff", sent=False, receipt=receipt), wake=False)
        if first is None:
            missing = BatonError("the KV came without its first token", kind=ErrorKind.TRANSFER, request_id=request_id)
            self._engine.kv_failed(request_id, missing)
        else:
            logprobs = None if first.logprob is None else TokenLogprobs(logprob=first.logprob, top=first.top)
            self._engine.kv_received(request_id, first.token_id, logprobs)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        request_id = self._request(transfer_id)
        self._count()
        log.warning("KV did not arrive", extra={"transfer": transfer_id, "error": str(error)})
        if request_id is not None and self._engine is not None:
            self._engine.kv_failed(request_id, as_transfer_error(error, request_id))

    def _request(self, transfer_id: TransferId) -> RequestId | None:
        with self._lock:
            return self._waiting.get(transfer_id)

    def _count(self) -> None:
        with self._lock:
            self._ended_transfers += 1
