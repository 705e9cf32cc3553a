"""The decode role: leases pages, hands out tickets, receives KV, streams tokens from #2 on. Colocated: no peers.

Threads: hooks come from the engine thread, on_receiving/on_received/on_failed from transfer threads, `accept` from the
event loop; everything is passed on at once. Invariant: a transfer is expected before its ticket leaves, and cancelled
by `release_kv`, so no KV is written into pages that are somebody else's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence

from baton_common.errors import Aborted, BatonError, InvalidRequest
from baton_common.ids import PageHash, PageId, RequestId, TransferId
from baton_engine.request import Mode, Request
from baton_engine.role import Fence, TokenLogprobs, TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer.records import FirstToken, Inbound, InboundEvents, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Filler
from baton_worker.handoff import as_transfer_error
from baton_worker.outbox import Ended, KvChanged, Outbox, Reserved, StepTokens
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
        self._storage = storage
        sources = [] if storage is None else [storage.source()]
        self._filler = Filler(engine=engine, sources=sources, page_tokens=compat.page_tokens)

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        if request.mode is Mode.PREFILL:
            raise InvalidRequest("this worker decodes; send PREFILL to a prefill worker", param="mode")
        if request.mode is Mode.RESERVE:
            request.transfer_id = TransferId(f"{self._incarnation}-{next(self._serials)}")
            if self._endpoint is None:  # no peer will ever bring the KV: whatever is missing is computed here
                request.local_below_tokens = len(request.tokens) + 1

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
        return 0

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        assert self._endpoint is not None
        assert request.transfer_id is not None
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
        raise AssertionError("`accept` refuses PREFILL")

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """Nothing is sent from here."""

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        raise AssertionError("`accept` refuses PREFILL")

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self._outbox.put(StepTokens(step=step, tokens=tuple(tokens)))

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        filled: Fence = DoneFence() if self._filler is None else self._filler.stop(request.request_id)
        if self._endpoint is None or request.transfer_id is None:
            return filled
        with self._lock:
            self._waiting.pop(request.transfer_id, None)
        over = error or Aborted("the request is over", request_id=request.request_id)
        return AllDone(filled, self._endpoint.cancel(request.transfer_id, over))

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        self._outbox.put(KvChanged(stored=tuple(stored), removed=tuple(removed)))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        if self._storage is not None and error is None:
            self._storage.keep_session(request)
        self._outbox.put(Ended(request_id=request.request_id, error=error))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def on_receiving(self, transfer_id: TransferId) -> None:
        request_id = self._request(transfer_id)
        if request_id is not None and self._engine is not None:
            self._engine.kv_receiving(request_id)

    def on_received(self, transfer_id: TransferId, first: FirstToken, receipt: Receipt) -> None:
        request_id = self._request(transfer_id)
        self._count()
        log.debug(
            "KV received",
            extra={"transfer": transfer_id, "bytes": receipt.bytes, "wire": receipt.wire, "from": receipt.peer},
        )
        if request_id is not None and self._engine is not None:
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
