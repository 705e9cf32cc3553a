"""The door of the engine: requests in, role hooks out, one thread in between.

One iteration of the engine thread: drain the inbox (blocks only when idle), retire fences, plan step n+1, launch it
behind step n, collect step n, call the hooks, check invariants. Everything that a request owns is touched by this thread
alone; other threads talk to it through the inbox.
It knows modes of requests and nothing of transports, gRPC or roles; see `role.py` for what it tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.ids import PageHash, RequestId
from baton_engine.config import EngineConfig
from baton_engine.exec.device import Device
from baton_engine.exec.pool import KvPool
from baton_engine.models.loader import LoadedModel
from baton_engine.request import Request
from baton_engine.role import Role, TokenLogprobs

CrashHandler = Callable[[BaseException, Mapping[str, object]], None]
"""Called on the engine thread after it failed: the exception, and a JSON-able dump (last plan, phases, page ledger).
Every request has had its on_ended by then, as far as that was possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot for load messages and health; `steps` advances as long as the engine does anything."""

    steps: int
    empty: bool                        # no request is anywhere: queue, rows, reservations, fences, inbox
    queued_requests: int
    queued_tokens: int                 # prompt tokens of waiting and running requests that are not computed yet
    running: int                       # requests that hold a row
    reserved: int                      # requests that hold pages and wait for their KV
    free_pages: int
    cached_pages: int                  # in the prefix tree, held by nobody: evictable
    leased_pages: int                  # held by requests
    in_flight_pages: int               # held by a fence alone
    total_pages: int
    step_ms: float                     # moving average, launch to collect
    prefill_tokens_per_s: float        # moving average


class Engine:
    """Continuous batching over one model on one device.

    The role may be called from the moment `start` is called, on the engine thread ("baton-engine") and, for
    `on_layers`, on the device thread. All methods but `start` and `stop` are thread-safe and never block.
    """

    pool: KvPool
    hash_root: PageHash
    """Start of the page-hash chain without cache salt; goes into WorkerHello."""
    context_tokens: int
    """Longest prompt + output that this engine takes; goes into WorkerHello."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        device: Device,
        role: Role,
        clock: Clock,
        on_crash: CrashHandler,
    ) -> None:
        """Allocates the KV pool. ConfigError, naming the setting to change, when it cannot hold one full context."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the engine thread. Once."""
        raise NotImplementedError

    def stop(self) -> None:
        """End everything in flight with Draining and join the thread. Blocks at most for the steps in flight and the
        fences of the role. Safe to call twice; not from a hook. The device stays open: it is the caller's."""
        raise NotImplementedError

    def submit(self, request: Request) -> None:
        """Take a request. The answer, a refusal too, comes through the role: on_ended(request, error)."""
        raise NotImplementedError

    def abort(self, request_id: RequestId, error: BatonError) -> None:
        """End a request with `error`. Unknown or ended ids are ignored: an abort may cross an end."""
        raise NotImplementedError

    def kv_receiving(self, request_id: RequestId) -> None:
        """RESERVE: the first chunk arrived."""
        raise NotImplementedError

    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """RESERVE: the KV of the prompt is complete and verified; `token_id` is output #1, made by the sender.

        The role gets no on_tokens for it: its client has it already. Decode goes on with output #2.
        """
        raise NotImplementedError

    def kv_failed(self, request_id: RequestId, error: BatonError) -> None:
        """RESERVE: no KV will come. The request ends with `error` once `release_kv`'s fence is done."""
        raise NotImplementedError

    def handoff_done(self, request_id: RequestId) -> None:
        """PREFILL: the receiver committed; the request ends without error."""
        raise NotImplementedError

    def handoff_failed(self, request_id: RequestId, error: BatonError) -> None:
        """PREFILL: the receiver will never commit; the request ends with `error`."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """The state after the last iteration; cheap, no lock."""
        raise NotImplementedError

    def cached_hashes(self) -> list[PageHash]:
        """Every page hash in the prefix tree, for a KV-event snapshot. Blocks for at most one iteration."""
        raise NotImplementedError
