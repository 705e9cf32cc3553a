"""Protobuf <-> engine records, both ways, in one place. Pure; no I/O, no clock of its own.

What the wire can get wrong is refused here, by field; values and lengths are the engine's business, which checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError, ErrorKind, Incompatible, InvalidRequest
from baton_common.hashing import tokens_from_bytes
from baton_common.ids import PageHash, RequestId
from baton_engine.request import FinishReason, Keep, Mode, Request, SamplingParams
from baton_engine.role import TokenLogprobs, TokenOut
from baton_proto import common_pb2, worker_pb2
from baton_proto.compat import mismatch

PROTOCOL_VERSION = 1
HASHES_PER_MESSAGE = 1 << 16  # 1 MiB: well under gRPC's default limit of 4 MiB

_MODES = {
    worker_pb2.SUBMIT_MODE_LOCAL: Mode.LOCAL,
    worker_pb2.SUBMIT_MODE_PREFILL: Mode.PREFILL,
    worker_pb2.SUBMIT_MODE_RESERVE: Mode.RESERVE,
}
_FINISH = {
    FinishReason.STOP: worker_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_REASON_LENGTH,
}


# ---- requests in ----------------------------------------------------------------------------------------------------
def request_from(submit: worker_pb2.Submit, *, request_id: RequestId, now_s: float) -> Request:
    """The engine's record of a Submit. Raises InvalidRequest with `param`."""
    mode = _MODES.get(submit.mode)
    if mode is None:
        raise InvalidRequest("unknown submit mode; is the router of the same version?", param="mode")
    if submit.deadline_ms == 0:
        raise InvalidRequest("deadline_ms must be positive: every request has a deadline", param="deadline_ms")
    if not submit.tokens or len(submit.tokens) % 4:
        raise InvalidRequest(f"{len(submit.tokens)} bytes of tokens are no int32 token ids", param="prompt")
    return Request(
        request_id=request_id,
        mode=mode,
        tokens=tokens_from_bytes(submit.tokens),
        prompt_tokens=submit.prompt_tokens,
        sampling=sampling_from(submit.sampling),
        deadline_s=now_s + submit.deadline_ms / 1000,
        arrival_s=now_s,
        priority=submit.priority,
        cache_salt=submit.cache_salt,
        local_below_tokens=submit.local_below_tokens,
        keep=_keep(submit.keep) if submit.HasField("keep") else None,
    )


def _keep(message: worker_pb2.KvKeep) -> Keep:
    if not message.session:
        raise InvalidRequest("a session that is kept needs a name", param="keep")
    return Keep(session=message.session, ttl_s=message.ttl_ms / 1000, tenant=message.tenant)


def sampling_from(message: worker_pb2.Sampling) -> SamplingParams:
    """As it came; the engine checks the ranges."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
        top_logprobs=message.top_logprobs,
    )


def sampling_message(sampling: SamplingParams) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
    )


HandleToken = tuple[int, TokenOut]


# ---- answers out ----------------------------------------------------------------------------------------------------
def tokens_message(step: int, entries: Sequence[HandleToken]) -> worker_pb2.WorkerMessage:
    """One message for all (handle, token) of one step that go to one router, in columns."""
    message = worker_pb2.Tokens(
        step=step,
        handles=[handle for handle, _ in entries],
        positions=[token.position for _, token in entries],
        token_ids=[token.token_id for _, token in entries],
    )
    for entry, (_, token) in enumerate(entries):
        if token.finish is not None:
            stop_token_id = token.token_id if token.finish is FinishReason.STOP else 0
            message.finishes.add(entry=entry, reason=_FINISH[token.finish], stop_token_id=stop_token_id)
        if token.logprobs is not None:
            message.logprobs.add(entry=entry, logprobs=logprobs_message(token.logprobs))
        if token.cached_tokens is not None:
            message.cached.add(entry=entry, cached_tokens=token.cached_tokens)
    return worker_pb2.WorkerMessage(tokens=message)


def tokens_from(message: worker_pb2.Tokens) -> list[HandleToken]:
    """The inverse, per entry (handle, token); the token's request id is left empty, as the wire does not carry it."""
    reasons = {wire: reason for reason, wire in _FINISH.items()}
    finishes = {item.entry: reasons[item.reason] for item in message.finishes}
    logprobs = {item.entry: logprobs_from(item.logprobs) for item in message.logprobs}
    cached = {item.entry: item.cached_tokens for item in message.cached}
    columns = zip(message.handles, message.positions, message.token_ids, strict=True)
    return [
        (
            handle,
            TokenOut(
                request_id=RequestId(""),
                position=position,
                token_id=token_id,
                finish=finishes.get(entry),
                logprobs=logprobs.get(entry),
                cached_tokens=cached.get(entry),
            ),
        )
        for entry, (handle, position, token_id) in enumerate(columns)
    ]


def logprobs_message(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[value for _, value in logprobs.top],
    )


def logprobs_from(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(logprob=message.logprob, top=tuple(zip(message.top_ids, message.top_logprobs, strict=True)))


def failed_message(handle: int, error: BatonError) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(failed=worker_pb2.Failed(handle=handle, error=error_message(error)))


def error_message(error: BatonError) -> common_pb2.Error:
    return common_pb2.Error(
        kind=common_pb2.ErrorKind.Value(f"ERROR_KIND_{error.kind.name}"),
        message=error.message,
        retry_after_ms=error.retry_after_ms,
        param=error.param,
    )


def error_from(message: common_pb2.Error) -> BatonError:
    """An unknown kind, from a newer peer, counts as INTERNAL."""
    name = common_pb2.ErrorKind.Name(message.kind).removeprefix("ERROR_KIND_")
    kind = ErrorKind[name] if name in ErrorKind.__members__ else ErrorKind.INTERNAL
    return BatonError(message.message, kind=kind, param=message.param, retry_after_ms=message.retry_after_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvChange:
    """Part of one KvEvents message; the stream adds its sequence number."""

    snapshot: bool
    stored: bytes
    removed: bytes


def kv_changes(stored: Sequence[PageHash], removed: Sequence[PageHash], *, snapshot: bool = False) -> list[KvChange]:
    """In pieces of at most HASHES_PER_MESSAGE; only the first of a snapshot says so. A snapshot has at least one."""
    changes = []
    for begin in range(0, max(len(stored), len(removed), 1 if snapshot else 0), HASHES_PER_MESSAGE):
        part = slice(begin, begin + HASHES_PER_MESSAGE)
        first = snapshot and begin == 0
        changes.append(KvChange(snapshot=first, stored=b"".join(stored[part]), removed=b"".join(removed[part])))
    return changes


# ---- compatibility --------------------------------------------------------------------------------------------------
def check_compat(ours: common_pb2.Compat, theirs: common_pb2.Compat) -> None:
    """Raises Incompatible for the first field, in declaration order, on which the two differ and must not."""
    if field := mismatch(ours, theirs):
        remedy = "start prefill and decode workers with the same model and settings"
        raise Incompatible(field, getattr(ours, field), getattr(theirs, field), remedy=remedy)
