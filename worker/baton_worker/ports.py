"""What the shell needs from its neighbours, so that each can be replaced in a test: engine, transfer endpoint, role.

`Engine` is an EnginePort and `KvEndpoint` a TransferPort as they stand. A WorkerRole is made before the engine, which
takes it as its role; it gets to know engine and endpoint afterwards, by `bind`, before the engine starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from baton_common.errors import BatonError
from baton_common.ids import RequestId, TransferId
from baton_engine.request import Request
from baton_engine.role import Fence, Role, TokenLogprobs
from baton_kvtransfer.records import FirstToken, Inbound, InboundEvents, Outbound, Pull
from baton_proto import common_pb2, worker_pb2

if TYPE_CHECKING:
    from baton_engine.engine import EngineStats
    from baton_worker.storage import Storage


class EnginePort(Protocol):
    """The engine's door: thread-safe, non-blocking; answers come through the role's hooks."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def stats(self) -> EngineStats: ...
    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: RequestId, error: BatonError) -> None: ...
    def kv_filled(self, request_id: RequestId, tokens: int) -> None: ...
    def kv_receiving(self, request_id: RequestId) -> None: ...
    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None) -> None: ...
    def kv_failed(self, request_id: RequestId, error: BatonError) -> None: ...
    def handoff_done(self, request_id: RequestId) -> None: ...
    def handoff_failed(self, request_id: RequestId, error: BatonError) -> None: ...


class OutboundTransfer(Protocol):
    """The sender's handle of one transfer."""

    @property
    def unsent_tokens(self) -> int: ...

    def ready(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int) -> None: ...
    def finish(self, first: FirstToken | None) -> None: ...
    def abort(self, error: BatonError) -> Fence: ...


class TransferPort(Protocol):
    """The endpoint's door, as far as roles use it."""

    def expect(self, inbound: Inbound) -> None: ...
    def cancel(self, transfer_id: TransferId, error: BatonError) -> Fence: ...
    def open(self, outbound: Outbound) -> OutboundTransfer: ...
    def pull(self, pull: Pull) -> None: ...


class WorkerRole(Role, Protocol):
    """The engine's hooks, and what the shell asks."""

    @property
    def inbound(self) -> InboundEvents:
        """Who hears of KV that arrives."""

    def bind(
        self,
        *,
        engine: EnginePort,
        endpoint: TransferPort | None,
        compat: common_pb2.Compat,
        storage: Storage | None = None,
    ) -> None:
        """Before the engine starts. No endpoint: nothing will ever be handed over; no storage: there are no tiers."""

    def accept(self, submit: worker_pb2.Submit, request: Request) -> None:
        """Before Engine.submit, on the event loop: complete `request`, or refuse it by raising a BatonError."""

    def hands_over(self, submit: worker_pb2.Submit) -> bool:
        """Whether this is how a request leaves the worker: then it is taken also while the worker drains."""

    def handoffs(self) -> int:
        """How many transfers have ended since the start; a number for Load."""


class DoneFence:
    """Nothing is running."""

    def done(self) -> bool:
        return True


class AllDone:
    """Several fences as one."""

    def __init__(self, *fences: Fence) -> None:
        self._fences = fences

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)
