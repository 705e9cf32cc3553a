"""Storage tiers of one worker: KV goes down when its pages are complete, and comes back before a prompt is computed.

Threads: `keep_pages`, `keep_session` and the source come from the engine thread, `end_session` from the event loop,
`status` from anywhere; none waits. Whatever is not found, late or damaged is computed.
It knows requests and the tiers' door, no engine and no role.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry

from baton_common.clock import Clock
from baton_common.errors import ConfigError
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import Request
from baton_engine.role import Fence
from baton_kvtransfer import PageLayout
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.tiers import (
    Copy,
    HostTooSmall,
    Namespace,
    SessionId,
    Ticket,
    TierConfig,
    TierMetrics,
    TierStack,
    open_tiers,
)
from baton_proto import common_pb2, worker_pb2
from baton_worker.filling import Done, Filling
from baton_worker.ports import DoneFence
from baton_worker.tiering import check_folder

PREFETCH_S = 0.5
"""Most that a prompt waits for pages on their way into host memory; what is there by then is used. One constant: tiers
that answer are ready in a few milliseconds, or bring more per second than any model computes; this bounds the rest."""


_WAITING_PART = 4
"""So much of the pool may wait to be copied down; it cannot be used meanwhile."""


_ANYWHERE = ("0.0.0.0", "::")


class Storage:
    """The tiers under one pool. Close it when the engine and everything else that uses its pages has stopped."""

    def __init__(self, stack: TierStack, *, page_tokens: int, session_bytes: int, clock: Clock) -> None:
        """`session_bytes`: most that the sessions of one tenant keep in host memory."""
        self._stack = stack
        self._page_tokens = page_tokens
        self._session_bytes = session_bytes
        self._clock = clock

    def source(self) -> TierSource:
        return TierSource(self._stack, page_tokens=self._page_tokens, clock=self._clock)

    def keep_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        """These pages are complete; they hold still until the fence is done. None: nothing is copied."""
        copy = self._stack.offload(hashes, pages)
        return None if copy.done() else copy

    def keep_session(self, request: Request) -> None:
        """The request finished: its pages stay for the next turn, as its `keep` says."""
        keep = request.keep
        if keep is not None:
            session = SessionId(keep.tenant, keep.session)
            self._stack.pin(session, request.hashes, ttl_s=keep.ttl_s, quota_bytes=self._session_bytes)

    def end_session(self, tenant: str, session: str) -> None:
        """Its pages make room before others do; a session that is unknown or over is none."""
        self._stack.evict_soon(self._stack.unpin(SessionId(tenant, session)))

    def status(self) -> list[worker_pb2.TierStatus]:
        return [
            worker_pb2.TierStatus(
                name=tier.name, state="off" if tier.reason else "on", bytes=tier.bytes, reason=tier.reason
            )
            for tier in self._stack.status()
        ]

    def close(self) -> None:
        """Blocks, while what waits to be written to tiers is written."""
        self._stack.close()


@dataclass(slots=True, kw_only=True)
class _Fill:
    """One request on its way up: first a ticket, then a copy."""

    ticket: Ticket
    pages: Sequence[PageId]
    first_page: int
    done: Done
    copy: Copy | None = None


class TierSource:
    """A `Source`: pages that the tiers hold."""

    def __init__(self, stack: TierStack, *, page_tokens: int, clock: Clock) -> None:
        self._stack = stack
        self._page_tokens = page_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._fills: dict[RequestId, _Fill] = {}

    def wants(self, request: Request) -> bool:
        return True

    def fill(self, filling: Filling, first_token: int, done: Done) -> None:
        first_page, end_page = first_token // self._page_tokens, len(filling.hashes)
        deadline_s = min(self._clock.now() + PREFETCH_S, filling.request.deadline_s)
        ticket = self._stack.prefetch(filling.hashes[first_page:], deadline_s=deadline_s)
        fill = _Fill(ticket=ticket, pages=filling.pages[first_page:end_page], first_page=first_page, done=done)
        request_id = filling.request.request_id
        with self._lock:
            self._fills[request_id] = fill
        ticket.on_over(partial(self._restore, request_id, fill))

    def stop(self, request_id: RequestId) -> Fence:
        with self._lock:
            fill = self._fills.pop(request_id, None)
        if fill is None:
            return DoneFence()
        fill.ticket.release()
        if fill.copy is None:
            return DoneFence()
        fill.copy.cancel()
        return fill.copy

    def _restore(self, request_id: RequestId, fill: _Fill) -> None:
        """No more pages come: copy those that did. Any thread."""
        with self._lock:
            if self._fills.get(request_id) is not fill:
                return
            fill.copy = self._stack.restore(fill.ticket, fill.pages)
        fill.copy.on_done(partial(self._restored, request_id, fill, fill.copy))

    def _restored(self, request_id: RequestId, fill: _Fill, copy: Copy) -> None:
        with self._lock:
            if self._fills.get(request_id) is not fill:
                return
            del self._fills[request_id]
        fill.done((fill.first_page + copy.pages) * self._page_tokens)


def open_storage(
    config: TierConfig,
    *,
    compat: common_pb2.Compat,
    layout: PageLayout,
    pool_pages: int,
    blocks: Blocks,
    host: str,
    free_bytes: int,
    clock: Clock,
    registry: CollectorRegistry,
) -> Storage | None:
    """What `--tiers` asks for; None = nothing. `blocks`: of the engine's pool. `host`: where other machines reach this.
    `free_bytes`: host memory that nothing else will take.

    Raises ConfigError when the host memory is too small or more than there is, the folder cannot be used or `host` is
    no address, WireError when a library is missing.
    """
    # besides tokens and format, KV depends on how it was computed
    made_by = (compat.model_digest, str(compat.weights_epoch), compat.compute_dtype, compat.rope)
    namespace = Namespace(model_digest="\x00".join(made_by), layout=layout, ranks=compat.tp_size)
    if config.host_bytes + config.mooncake_segment_bytes > free_bytes:
        lent_mib, most_mib = config.mooncake_segment_bytes >> 20, free_bytes - config.mooncake_segment_bytes >> 20
        beside = f" beside the {lent_mib} MiB that mooncake lends" if lent_mib else ""
        remedy = f"write host={most_mib}MiB or less" if most_mib > 0 else "lend less, or leave the tiers out"
        raise ConfigError(
            f"--tiers: {free_bytes >> 20} MiB of memory are left, too few for "
            f"host={config.host_bytes >> 20}MiB{beside}; {remedy}",
            param="tiers",
        )
    if config.folder:
        check_folder(config.folder)
    if config.mooncake_master and host in _ANYWHERE:
        raise ConfigError(
            f"--tiers: nobody finds what mooncake lends at {host}; set --peer-advertise to this machine's address",
            param="tiers",
        )
    config = replace(config, queue_pages=max(config.queue_pages, pool_pages // _WAITING_PART))
    metrics = TierMetrics(registry)
    try:
        stack = open_tiers(config, namespace=namespace, blocks=blocks, host=host, clock=clock, metrics=metrics)
    except HostTooSmall as error:
        raise ConfigError(
            f"--tiers: host={config.host_bytes} does not hold {error.least_pages} pages of {error.page_bytes} bytes; "
            f"write host={error.least_bytes} or more",
            param="tiers",
        ) from None
    if stack is None:
        return None
    return Storage(stack, page_tokens=layout.page_tokens, session_bytes=config.session_bytes, clock=clock)
