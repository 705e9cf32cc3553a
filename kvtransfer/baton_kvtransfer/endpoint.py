"""The door: one endpoint per worker process, which sends and receives KV.

Promises: nothing remote ever writes into the pool; a transfer ends in exactly one way; after `cancel` or `abort` no new
scatter or gather on its pages starts, and the returned fence says when the running one is over. Every call returns at
once; the work is done on threads owned by this room (one listener, one per link).
It does not know models, schedulers or routers.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from baton_common.clock import Clock
from baton_common.errors import BatonError, ConfigError, ErrorKind
from baton_common.ids import PageId, TransferId
from baton_kvtransfer.acceptor import Acceptor
from baton_kvtransfer.admission import Admission
from baton_kvtransfer.blocks import Blocks, HostBlocks
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.config import SLOT_UNIT_BYTES, TransferConfig
from baton_kvtransfer.errors import Aborted, DeadlineExceeded
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.inlink import InLink
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.link import Link, Local
from baton_kvtransfer.metrics import TransferMetrics
from baton_kvtransfer.outlink import OutLink
from baton_kvtransfer.plan import cell_bytes
from baton_kvtransfer.pulling import Asked, question
from baton_kvtransfer.records import Fence, Inbound, InboundEvents, Outbound, PeerInfo, Pull
from baton_kvtransfer.transfer import Transfer
from baton_kvtransfer.transport import SocketTransport, Transport
from baton_proto.common_pb2 import Compat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KvEndpoint", "Transfer"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_JOIN_S = 3.0
_REMEMBERED_LINKS = 256
_UNSAID_HELLOS = 16
"""Connections beyond max_peers that may be open at once, so that the refusal can be said."""


class KvEndpoint:
    """`pool` is in logical axis order (page, layer, kv, head, token, dim), strided as `layout` says; CPU or device."""

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: str,
        compat: Compat,
        pool: Tensor,
        layout: PageLayout,
        config: TransferConfig,
        clock: Clock,
        events: InboundEvents,
        metrics: TransferMetrics,
        blocks: Blocks | None = None,
        transport: Transport | None = None,
    ) -> None:
        """`blocks` copies to and from a pool that is not in host memory. `transport` replaces the sockets of `config`,
        for tests and embedding. Raises ValueError, WireError, ConfigError for slots that are too small."""
        _check_slots(config, layout)
        self._local = Local(
            worker_id=worker_id,
            incarnation=incarnation,
            compat=compat,
            layout=layout,
            blocks=blocks or HostBlocks(pool, layout),
            config=config,
            clock=clock,
            metrics=metrics,
            transport=transport or SocketTransport(config),
        )
        self._pages = int(pool.shape[0])
        self._events = events
        self._expected = Expectations()
        self._admission = Admission(incarnation=incarnation, compat=compat, max_peers=config.max_peers)
        self._acceptor: Acceptor | None = None
        self._address = ""  # of the listener
        self._lock = threading.Lock()  # of everything below
        self._closed = False
        self._numbers = 0
        self._out: dict[tuple[str, str], OutLink] = {}
        self._links: set[Link] = set()
        self._former: OrderedDict[tuple[str, str], PeerInfo] = OrderedDict()

    def start(self) -> str:
        """Listen; returns the address for WorkerHello.peer_address. Raises WireError naming the port that is in use."""
        listener = self._local.transport.listen()
        self._address = listener.address
        self._acceptor = Acceptor(
            listener=listener, clock=self._local.clock, on_channel=self._accepted, on_time=self._end_overdue
        )
        self._acceptor.start()
        return listener.address

    def close(self) -> None:
        """End everything in flight with Aborted, join all threads. Blocks at most a few seconds. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links)
        if self._acceptor is not None:
            self._acceptor.stop(_JOIN_S)
        for link in links:
            link.stop()
        for link in links:
            if not link.join(_JOIN_S):
                log.error("a transfer thread did not end", extra={"peer": link.info().worker_id})
        self._local.transport.close()
        for transfer_id in self._expected.ids():
            self._fail(transfer_id, Aborted("this endpoint was closed", kind=ErrorKind.DRAINING))

    def expect(self, inbound: Inbound) -> None:
        """Call before the ticket leaves. Raises ValueError when the id is known or the range does not fit the pool."""
        self._expected.add(replace(inbound, pages=self._checked(inbound)))
        if self._acceptor is not None:
            self._acceptor.wake()

    def cancel(self, transfer_id: TransferId, error: BatonError) -> Fence:
        """No scatter into its pages starts after this; the fence says when none is running. Idempotent.

        No event is delivered for it any more once this returned (one that is being delivered may overlap).
        """
        return self._expected.cancel(transfer_id, error)

    def open(self, outbound: Outbound) -> Transfer:
        """Start sending; connects to the peer when there is no link yet. Failures come through `outbound.done`.

        Raises ValueError when the range does not fit the pool, Aborted when this endpoint is closed.
        """
        order = replace(outbound, pages=self._checked(outbound))

        def use(link: OutLink) -> Transfer | None:
            transfer = Transfer(order, link.tell, self._local.clock, self._local.layout)
            return transfer if link.open(transfer) else None

        return self._over_link(outbound.peer_address, outbound.peer_incarnation, use)

    def pull(self, pull: Pull) -> None:
        """Ask a peer for KV that it holds; `expect` its transfer before, with the same positions.

        It ends as every expectation does, and with on_failed when the peer refuses (PullDenied) or the link on which
        we ask is lost before anything comes. Raises ValueError for an id that is not expected, Aborted when this
        endpoint is closed.
        """
        if not self._expected.awaits(pull.transfer_id):
            raise ValueError(f"transfer {pull.transfer_id} is not expected")
        local = self._local
        message = question(
            pull, address=self._address, incarnation=local.incarnation, page_tokens=local.layout.page_tokens
        )

        def use(link: OutLink) -> bool:
            return link.pull(pull.transfer_id, message)

        self._over_link(pull.peer_address, pull.peer_incarnation, use)

    def peers(self) -> list[PeerInfo]:
        """Snapshot of all links, refused and lost ones included until they are replaced."""
        with self._lock:
            live = [link.info() for link in self._links]
            names = {(info.direction, info.worker_id or info.address) for info in live}
            return live + [info for key, info in self._former.items() if key not in names]

    # ---- helpers ------------------------------------------------------------------------------------------------
    def _over_link(self, address: str, incarnation: str, use: Callable[[OutLink], T | None]) -> T:
        """`use` posts to the link to that peer, and says falsely when it is over; then a new one is dialled."""
        key = (address, incarnation)
        with self._lock:
            if self._closed:
                raise Aborted("this endpoint is closed", kind=ErrorKind.DRAINING)
            link = self._out.get(key)
            if link is not None and (used := use(link)):
                return used
            asked = Asked(self._expected, self._pull_failed)
            link = OutLink(address=address, incarnation=incarnation, local=self._local, asked=asked, ended=self._ended)
            used = use(link)  # before the thread starts: it may be over before we could say anything
            assert used, "a link that has not started takes everything"
            self._out[key] = link
            self._links.add(link)
            link.start()
            return used

    def _checked(self, order: Inbound | Outbound) -> Sequence[PageId]:
        """Its page table as an array: pieces of it are taken for every chunk, and no copy walks over its entries."""
        pages, first_token, end_token = order.pages, order.first_token, order.end_token
        size, heads = self._local.layout.page_tokens, self._local.layout.heads
        if order.heads is not None and not 0 <= order.heads[0] < order.heads[1] <= heads:
            raise ValueError(f"heads [{order.heads[0]}, {order.heads[1]}) of a pool of {heads}")
        if not 0 <= first_token <= end_token <= len(pages) * size:
            raise ValueError(f"positions [{first_token}, {end_token}) do not fit {len(pages)} pages of {size}")
        table = np.asarray(pages, dtype=np.intp)
        touched = table[first_token // size : -(-end_token // size)]
        if len(touched) and not 0 <= touched.min() <= touched.max() < self._pages:
            raise ValueError(f"a page id is outside the pool of {self._pages} pages")
        return cast("Sequence[PageId]", table)

    def _accepted(self, channel: Channel) -> None:
        with self._lock:
            inbound = sum(isinstance(link, InLink) for link in self._links)
            if self._closed or inbound >= self._local.config.max_peers + _UNSAID_HELLOS:
                channel.close()
                return
            self._numbers += 1
            link = InLink(
                channel=channel,
                number=self._numbers,
                local=self._local,
                admission=self._admission,
                expected=self._expected,
                events=self._events,
                ended=self._ended,
            )
            link.start()
            self._links.add(link)

    def _ended(self, link: Link) -> None:
        info = link.info()
        with self._lock:
            self._links.discard(link)
            for key in [key for key, held in self._out.items() if held is link]:
                del self._out[key]
            name = info.worker_id or info.address
            if name:
                self._former[info.direction, name] = info
                self._former.move_to_end((info.direction, name))
            if len(self._former) > _REMEMBERED_LINKS:
                self._former.popitem(last=False)

    def _end_overdue(self) -> float | None:
        for inbound in self._expected.overdue(self._local.clock.now()):
            late = DeadlineExceeded(
                f"transfer {inbound.transfer_id}: no peer came before the deadline",
                transfer_id=inbound.transfer_id,
                phase="new",
                kind=ErrorKind.DEADLINE,
            )
            late.request_id = inbound.request_id
            self._fail(inbound.transfer_id, late)
        return self._expected.next_deadline_s()

    def _pull_failed(self, inbound: Inbound, error: BatonError) -> None:
        self._local.metrics.failed.labels("in", type(error).__name__).inc()
        self._events.on_failed(inbound.transfer_id, error)

    def _fail(self, transfer_id: TransferId, error: BatonError) -> None:
        if self._expected.end(transfer_id):
            self._local.metrics.failed.labels("in", type(error).__name__).inc()
            self._events.on_failed(transfer_id, error)


def _check_slots(config: TransferConfig, layout: PageLayout) -> None:
    """A chunk is one position of one head at the least."""
    least = cell_bytes(layout)
    if config.slot_bytes < least:
        raise ConfigError(
            f"slot_bytes is {config.slot_bytes}, one position of one KV head takes {least} bytes; "
            f"set slot_bytes to {-(-least // SLOT_UNIT_BYTES) * SLOT_UNIT_BYTES} or more",
            param="slot_bytes",
        )
