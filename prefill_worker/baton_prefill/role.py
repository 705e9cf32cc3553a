"""The prefill role: computes prompts and token #1, and hands the KV to the decode worker named in the ticket.

What that decode worker has of a prompt, from turns before, is pulled back instead of computed.
Threads: hooks come from the engine thread, `on_layers` from the device thread, events of transfers from theirs,
`accept` from the event loop; everything is passed on at once. Invariant: no gather and no scatter on a request's pages
starts after `release_kv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.clock import Clock
from baton_common.errors import BatonError, ErrorKind, InvalidRequest
from baton_common.ids import PageHash, PageId, TransferId
from baton_engine.request import Mode, Request
from baton_engine.role import Fence, TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer.errors import PullDenied
from baton_kvtransfer.records import FirstToken, InboundEvents, PullOrder, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Filler, Source
from baton_worker.handoff import Handoffs
from baton_worker.outbox import Ended, KvChanged, Outbox, StepTokens
from baton_worker.ports import AllDone, DoneFence, EnginePort, TransferPort
from baton_worker.pulling import PullSource
from baton_worker.storage import Storage


class PrefillRole:
    """Binds the engine's hooks to the outbox and to the transfer endpoint."""

    def __init__(self, *, outbox: Outbox, clock: Clock) -> None:
        self._outbox = outbox
        self._clock = clock
        self._handoffs: Handoffs
        self._pulls: PullSource
        self._storage: Storage | None = None
        self._filler: Filler | None = None

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
        assert endpoint is not None, "a prefill worker without peers has nobody to compute for"
        self._handoffs = Handoffs(engine=engine, endpoint=endpoint, compat=compat, outbox=self._outbox)
        self._pulls = PullSource(
            endpoint=endpoint,
            compat=compat,
            clock=self._clock,
            ticket=self._handoffs.ticket,
            outbox=self._outbox,
        )
        self._storage = storage
        sources: list[Source] = [self._pulls] if storage is None else [storage.source(), self._pulls]
        self._filler = Filler(engine=engine, sources=sources, page_tokens=compat.page_tokens)

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        """Refuses what could not be handed over, before anything is computed: Incompatible names the field."""
        if request.mode is not Mode.PREFILL:
            raise InvalidRequest("this worker prefills; send LOCAL and RESERVE to a decode worker", param="mode")
        self._handoffs.accept(submit, request)

    def hands_over(self, submit: worker_pb2.Submit) -> bool:
        return False  # what is not computed yet is computed elsewhere

    def handoffs(self) -> int:
        return self._handoffs.ended

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
        return self._handoffs.unsent_tokens

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        raise AssertionError("`accept` refuses RESERVE")

    def on_local(self, request: Request) -> None:
        raise AssertionError("`accept` refuses RESERVE")

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        self._handoffs.admitted(request, pages, computed_tokens)

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """Device thread."""
        self._handoffs.layers(plan, layer_begin, layer_end)

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        self._handoffs.done(request, first)

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self._outbox.put(StepTokens(step=step, tokens=tuple(tokens)))

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        filled: Fence = DoneFence() if self._filler is None else self._filler.stop(request.request_id)
        return AllDone(filled, self._handoffs.release(request, error))

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        self._outbox.put(KvChanged(stored=tuple(stored), removed=tuple(removed)))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        if self._storage is not None and error is None:
            self._storage.keep_session(request)
        self._handoffs.forget(request.request_id)
        self._outbox.put(Ended(request_id=request.request_id, error=error))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def on_pull(self, order: PullOrder) -> None:
        order.refuse(
            PullDenied("this worker makes no reservations", peer=order.peer, phase="pull", kind=ErrorKind.INVALID)
        )

    def on_receiving(self, transfer_id: TransferId) -> None:
        """Nothing to do before all of it is here."""

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        self._pulls.received(transfer_id, receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        self._pulls.failed(transfer_id, error)
