"""OpenAI parameters to the wire's Sampling, with the checks that need the model: vocabulary, context, room for output.

Pure: the random seed of a request without one is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton_common.errors import InvalidRequest
from baton_proto.worker_pb2 import Sampling
from baton_router.schema import ChatRequest, CompletionRequest

DEFAULT_CHAT_TOKENS = 4096
"""Without max_tokens a chat answer may use what is left of the context, but not more than this."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""
SEEDS = 2**64


class ContextExceeded(InvalidRequest):
    """The prompt leaves no room for one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the connected workers, or the checkpoint, allow."""

    context_tokens: int
    vocab_size: int


def chat_sampling(request: ChatRequest, *, prompt_tokens: int, limits: ModelLimits, seed: int) -> Sampling:
    """Sampling of choice 0. Raises InvalidRequest."""
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    room = _room(prompt_tokens, limits, "messages")
    sampling = _common(request, limits, seed)
    sampling.max_tokens = _output_tokens(asked, name, room, DEFAULT_CHAT_TOKENS, prompt_tokens, limits)
    sampling.logprobs = bool(request.logprobs)
    sampling.top_logprobs = request.top_logprobs or 0
    return _checked(sampling)


def completion_sampling(request: CompletionRequest, *, prompt_tokens: int, limits: ModelLimits, seed: int) -> Sampling:
    """Sampling of choice 0. Raises InvalidRequest."""
    room = _room(prompt_tokens, limits, "prompt")
    sampling = _common(request, limits, seed)
    sampling.max_tokens = _output_tokens(
        request.max_tokens, "max_tokens", room, DEFAULT_COMPLETION_TOKENS, prompt_tokens, limits
    )
    sampling.logprobs = request.logprobs is not None
    sampling.top_logprobs = request.logprobs or 0
    return _checked(sampling)


def for_choice(sampling: Sampling, index: int) -> Sampling:
    """Choice i draws with seed + i; everything else is equal."""
    if index == 0:
        return sampling
    own = Sampling()
    own.CopyFrom(sampling)
    own.seed = (sampling.seed + index) % SEEDS
    return own


def _common(request: ChatRequest | CompletionRequest, limits: ModelLimits, seed: int) -> Sampling:
    stop_ids = request.stop_token_ids or []
    wrong = next((token for token in stop_ids if token >= limits.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"stop_token_ids: {wrong} is outside the vocabulary of {limits.vocab_size}", param="stop_token_ids"
        )
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else max(request.top_p, 1e-6),
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request.logit_bias or {}, limits.vocab_size),
        seed=(seed if request.seed is None else request.seed) % SEEDS,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
    )


def _bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or int(key) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias: {key!r} is no token id of this vocabulary of {vocab_size}", param="logit_bias"
            )
        found[int(key)] = value
    return found


def _room(prompt_tokens: int, limits: ModelLimits, param: str) -> int:
    room = limits.context_tokens - prompt_tokens
    if room < 1:
        raise ContextExceeded(
            f"this model's context is {limits.context_tokens} tokens, but the prompt has {prompt_tokens} "
            "and at least one is needed for the answer; shorten the prompt",
            param=param,
        )
    return room


def _output_tokens(
    asked: int | None, name: str, room: int, default: int, prompt_tokens: int, limits: ModelLimits
) -> int:
    if asked is None:
        return min(room, default)
    if asked > room:
        raise InvalidRequest(
            f"{name} is {asked}, but a prompt of {prompt_tokens} tokens leaves {room} "
            f"of the context of {limits.context_tokens}",
            param=name,
        )
    return asked


def _checked(sampling: Sampling) -> Sampling:
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}", param="min_tokens"
        )
    return sampling
