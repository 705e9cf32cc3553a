"""The door: one endpoint per worker process, which sends and receives KV.

Promises: nothing remote ever writes into the pool; a transfer ends in exactly one way; after `cancel` or `abort` no new
scatter or gather on its pages starts, and the returned fence says when the running one is over. Every call returns at
once; the work is done on threads owned by this room (one listener, one per link).
It does not know models, schedulers or routers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.metrics import TransferMetrics
from baton_kvtransfer.records import Fence, FirstToken, Inbound, InboundEvents, Outbound, PeerInfo
from baton_proto.common_pb2 import Compat

if TYPE_CHECKING:
    from torch import Tensor


class Transfer:
    """The sender's handle of one transfer. Thread-safe; every method only enqueues."""

    def ready(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int) -> None:
        """KV of these layers and positions is in the pool. Per layer, positions come in order, without gaps.

        Positions outside [first_token, end_token), and those announced before, are ignored. A prefix hit is announced
        the same way, for all layers, right after `open`.
        """
        raise NotImplementedError

    def finish(self, first: FirstToken) -> None:
        """Everything was announced; `first` travels with the last message. Then `done` follows."""
        raise NotImplementedError

    def abort(self, error: BatonError) -> Fence:
        """Give up; idempotent, also after the end. `done` is not called any more once this returned.

        The pages may be freed when the fence is done (at once, unless a gather is running).
        """
        raise NotImplementedError


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
    ) -> None:
        raise NotImplementedError

    def start(self) -> str:
        """Listen; returns the address for WorkerHello.peer_address. Raises WireError naming the port that is in use."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything in flight with Aborted, join all threads. Blocks at most a few seconds. Idempotent."""
        raise NotImplementedError

    def expect(self, inbound: Inbound) -> None:
        """Call before the ticket leaves. Raises ValueError when the id is known or the range does not fit the pages."""
        raise NotImplementedError

    def cancel(self, transfer_id: TransferId, error: BatonError) -> Fence:
        """No scatter into its pages starts after this; the fence says when none is running. Idempotent.

        No event is delivered for it any more once this returned (one that is being delivered may overlap).
        """
        raise NotImplementedError

    def open(self, outbound: Outbound) -> Transfer:
        """Start sending; connects to the peer when there is no link yet. Failures come through `outbound.done`.

        Raises ValueError when the range does not fit the pages.
        """
        raise NotImplementedError

    def peers(self) -> list[PeerInfo]:
        """Snapshot of all links, refused and lost ones included until they are replaced."""
        raise NotImplementedError
