"""What traces show of one request on this worker: its part as a span, and each transfer of its KV as a child of that.

Made once, when the request is over, from the stamps that engine and transfer set anyway: nothing is measured for it.
A phase that was entered twice (after a preemption) shows when it was entered last. Event loop only.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.errors import BatonError, ErrorKind
from baton_common.telemetry import OFF, Kind, Span, Tracing
from baton_engine.request import Mode, Request
from baton_worker.outbox import KvMoved

_NAMES = {Mode.LOCAL: "local", Mode.PREFILL: "prefill", Mode.RESERVE: "decode"}


class RequestSpans:
    """Without tracing it does nothing."""

    def __init__(self, tracing: Tracing = OFF) -> None:
        self._tracing = tracing

    def tell(self, request: Request, *, parent: str, moves: Sequence[KvMoved], error: BatonError | None) -> None:
        """`request` is FREED. `parent`: the router's traceparent; "" = nobody traces this request, a probe perhaps.

        An abort is somebody's wish and no error.
        """
        if self._tracing is OFF or not parent:
            return
        span = self._tracing.span(
            _NAMES[request.mode],
            parent=parent,
            kind=Kind.SERVER,
            at_s=request.arrival_s,
            attributes={
                "baton.request_id": request.request_id,
                "baton.prompt_tokens": request.prompt_tokens,
                "baton.output_tokens": request.output_tokens,
                "baton.cached_tokens": request.cached_tokens,
                "baton.filled_tokens": request.filled_tokens,
                "baton.preemptions": request.preemptions,
            },
        )
        for move in moves:
            self._moved(span, move)
        stamps = sorted(request.stamps.items(), key=lambda stamp: stamp[1])
        for phase, at_s in stamps:
            span.event(phase.value, at_s=at_s)
        if error is not None:
            span.set({"baton.ended": error.kind.value, "baton.ended_because": error.message})
        failed = error is not None and error.kind is not ErrorKind.ABORTED
        span.end(error=str(error) if failed else "", at_s=stamps[-1][1] if stamps else None)

    def _moved(self, parent: Span, move: KvMoved) -> None:
        receipt = move.receipt
        span = self._tracing.span(
            move.what,
            parent=parent.traceparent,
            kind=Kind.PRODUCER if move.sent else Kind.CONSUMER,
            at_s=receipt.first_chunk_s,
            attributes={
                "baton.kv.transfer_id": receipt.transfer_id,
                "baton.kv.peer": receipt.peer,
                "baton.kv.wire": receipt.wire,
                "baton.kv.bytes": receipt.bytes,
                "baton.kv.chunks": receipt.chunks,
                "baton.kv.resends": receipt.resends,
                "baton.kv.exposed_ms": receipt.exposed_s * 1000,
            },
        )
        span.event("last chunk", at_s=receipt.last_chunk_s)
        span.event("all announced" if move.sent else "all sent", at_s=receipt.finish_s)
        span.end(at_s=receipt.commit_s)
