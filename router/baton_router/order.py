"""What a flight carries, and what workers are told of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.hashing import token_bytes
from baton_common.telemetry import UNRECORDED, Span
from baton_proto import worker_pb2 as wire
from baton_router.tokens import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is flown. Times on the event loop's clock."""

    request_id: str
    prompt: Prompt
    sampling: wire.Sampling
    deadline_s: float
    worker_wait_s: float
    resume_wait_s: float
    local_below_tokens: int
    priority: int = 0
    span: Span = UNRECORDED
    """Hears where the request went; its name is handed on to the workers."""
    keep: wire.KvKeep | None = None


def submission(
    order: Order, mode: wire.SubmitMode, *, outputs: Sequence[int], now_s: float, ticket: wire.Ticket | None = None
) -> wire.Submit:
    """What one worker is told of an order; `outputs` are the tokens made so far, elsewhere."""
    left_ms = max(int((order.deadline_s - now_s) * 1000), 1)
    message = wire.Submit(
        request_id=order.request_id,
        mode=mode,
        tokens=order.prompt.raw + token_bytes(outputs) if outputs else order.prompt.raw,
        prompt_tokens=len(order.prompt.ids),
        sampling=order.sampling,
        deadline_ms=min(left_ms, 2**32 - 1),
        cache_salt=order.prompt.cache_salt,
        traceparent=order.span.traceparent,
        priority=order.priority,
    )
    if mode == wire.SUBMIT_MODE_RESERVE:
        message.local_below_tokens = order.local_below_tokens
    if order.keep is not None and mode != wire.SUBMIT_MODE_PREFILL:  # kept where the request ends
        message.keep.CopyFrom(order.keep)
    if ticket is not None:
        message.ticket.CopyFrom(ticket)
    return message
