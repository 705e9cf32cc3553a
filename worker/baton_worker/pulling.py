"""The decode worker as a source of KV: what it has of a prompt and this prefill worker has not, it sends back.

The ticket of a PREFILL request says how far decode's KV reaches: the turns that it answered itself. Computing is always
possible, so a pull has one short deadline, and whatever goes wrong only means that more is computed.
Threads: `wants`, `fill` and `stop` on the engine thread, `received` and `failed` on transfer threads; nothing blocks.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from baton_common.clock import Clock
from baton_common.errors import Aborted, BatonError
from baton_common.ids import RequestId, TransferId
from baton_engine.request import Request
from baton_engine.role import Fence
from baton_kvtransfer.records import Inbound, Pull, Receipt
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Done, Filling
from baton_worker.outbox import KvMoved, Outbox
from baton_worker.ports import DoneFence, TransferPort

log = logging.getLogger("baton.worker")

PULL_S = 2.0
"""Most that a prompt waits for KV of its decode worker. One constant: links bring gigabytes in that time, which is what
long prompts hold; a peer that has not brought it by then is stopped, cut off or busy, and computing is the better half.
Below the three heartbeats after which a silent link is given up, which is why it is not left to them."""
LEAST_TOKENS = 64
"""Fewer are computed in the time that asking takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pulling:
    request_id: RequestId
    transfer_id: TransferId
    first_token: int
    end_token: int
    done: Done


class PullSource:
    """A `Source`; its owner passes on what the endpoint says of the transfers that it expects."""

    def __init__(
        self,
        *,
        endpoint: TransferPort,
        compat: common_pb2.Compat,
        clock: Clock,
        ticket: Callable[[RequestId], worker_pb2.Ticket | None],
        outbox: Outbox,
    ) -> None:
        """`ticket`: of a PREFILL request; None for others."""
        self._endpoint = endpoint
        self._compat = compat
        self._clock = clock
        self._ticket = ticket
        self._outbox = outbox
        self._serials = itertools.count(1)
        self._lock = threading.Lock()
        self._by_request: dict[RequestId, _Pulling] = {}
        self._by_transfer: dict[TransferId, _Pulling] = {}

    # ---- engine thread ----------------------------------------------------------------------------------------------
    def wants(self, request: Request) -> bool:
        """KV of another precision is left there: the cache here would hand it on as its own."""
        ticket = self._ticket(request.request_id)
        return (
            ticket is not None
            and ticket.first_missing_token >= LEAST_TOKENS
            and ticket.compat.kv_dtype == self._compat.kv_dtype
        )

    def fill(self, filling: Filling, first_token: int, done: Done) -> None:
        ticket = self._ticket(filling.request.request_id)
        page = filling.page_tokens
        end_token = 0 if ticket is None else min(ticket.first_missing_token, filling.end_token) // page * page
        if ticket is None or end_token - first_token < LEAST_TOKENS:
            done(first_token)
            return
        request = filling.request
        pulling = _Pulling(
            request_id=request.request_id,
            transfer_id=TransferId(f"{ticket.transfer_id}.pull-{next(self._serials)}"),
            first_token=first_token,
            end_token=end_token,
            done=done,
        )
        with self._lock:
            self._by_request[request.request_id] = self._by_transfer[pulling.transfer_id] = pulling
        self._endpoint.expect(
            Inbound(
                transfer_id=pulling.transfer_id,
                request_id=request.request_id,
                pages=filling.pages,
                first_token=first_token,
                end_token=end_token,
                deadline_s=min(self._clock.now() + PULL_S, request.deadline_s),
            )
        )
        pull = Pull(
            transfer_id=pulling.transfer_id,
            ticket=TransferId(ticket.transfer_id),
            peer_address=ticket.peer_address,
            peer_incarnation=ticket.incarnation,
            first_token=first_token,
            end_token=end_token,
            page_hash=filling.hashes[end_token // page - 1],
        )
        try:
            self._endpoint.pull(pull)
        except BatonError as error:  # the endpoint closes
            self._endpoint.cancel(pulling.transfer_id, error)
            self._end(pulling.transfer_id, first_token)

    def stop(self, request_id: RequestId) -> Fence:
        with self._lock:
            pulling = self._by_request.pop(request_id, None)
            if pulling is None:
                return DoneFence()
            del self._by_transfer[pulling.transfer_id]
        return self._endpoint.cancel(pulling.transfer_id, Aborted("the request is over", request_id=request_id))

    # ---- transfer threads -------------------------------------------------------------------------------------------
    def received(self, transfer_id: TransferId, receipt: Receipt) -> None:
        pulling = self._end(transfer_id, None)
        if pulling is not None:
            fields = {"request": pulling.request_id, "tokens": pulling.end_token - pulling.first_token}
            log.debug("KV pulled back", extra={**fields, "bytes": receipt.bytes, "from": receipt.peer})
            moved = KvMoved(request_id=pulling.request_id, what="pull", sent=False, receipt=receipt)
            self._outbox.put(moved, wake=False)

    def failed(self, transfer_id: TransferId, error: BatonError) -> None:
        pulling = self._end(transfer_id, 0)
        if pulling is not None:
            fields = {"request": pulling.request_id, "tokens": pulling.end_token - pulling.first_token}
            log.info("KV was not pulled back; it is computed", extra={**fields, "why": str(error)})

    def _end(self, transfer_id: TransferId, tokens: int | None) -> _Pulling | None:
        """`tokens`: how far KV reaches now, if not to the end. The source's word is given outside its lock."""
        with self._lock:
            pulling = self._by_transfer.pop(transfer_id, None)
            if pulling is None:
                return None
            del self._by_request[pulling.request_id]
        pulling.done(pulling.end_token if tokens is None else max(tokens, pulling.first_token))
        return pulling
