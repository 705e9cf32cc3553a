"""Decisions as pure functions: refusals, endings, shares of the token budget.

HRRN (highest response ratio next, Brinch Hansen 1971): (wait + work) / work. Short prompts go first, waiting ones rise;
the order needs no speed, because wait / remaining tokens sorts alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton_common.errors import BatonError, InvalidRequest
from baton_engine.request import FinishReason, Request
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.entry import Entry

RETRY_MIN_MS = 50
RETRY_MAX_MS = 10_000


def refusal(request: Request, config: SchedulerConfig) -> BatonError | None:
    """Why the request can never work here, or None. Every message has both numbers."""
    length, pool_tokens = len(request.tokens), config.total_pages * config.page_tokens
    request_id = request.request_id
    if not 0 < request.prompt_tokens <= length:
        return InvalidRequest(
            f"prompt of {request.prompt_tokens} tokens in a sequence of {length}", request_id=request_id, param="prompt"
        )
    if length >= config.context_tokens:
        return InvalidRequest(
            f"{length} tokens leave no room in a context of {config.context_tokens}; shorten the prompt",
            request_id=request_id,
            param="prompt",
        )
    if length >= pool_tokens:
        return InvalidRequest(
            f"{length} tokens do not fit the KV pool of {pool_tokens} tokens; shorten the prompt or enlarge the pool",
            request_id=request_id,
            param="prompt",
        )
    if request.sampling.max_tokens <= request.output_tokens:
        return InvalidRequest(
            f"max_tokens is {request.sampling.max_tokens}, {request.output_tokens} outputs exist already",
            request_id=request_id,
            param="max_tokens",
        )
    return None


def finish_reason(request: Request, eos_token_ids: frozenset[int], context_tokens: int) -> FinishReason | None:
    """Whether the newest token of `request.tokens` ends it. A stop before min_tokens outputs does not count."""
    sampling, token = request.sampling, request.tokens[-1]
    stops = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
    if stops and request.output_tokens > sampling.min_tokens:
        return FinishReason.STOP
    if request.output_tokens >= sampling.max_tokens or len(request.tokens) >= context_tokens:
        return FinishReason.LENGTH
    return None


def longest_tokens(request: Request, context_tokens: int) -> int:
    """Tokens of the sequence at its latest possible end."""
    return min(request.prompt_tokens + request.sampling.max_tokens, context_tokens)


def prefill_order(entry: Entry, now_s: float) -> tuple[int, float, int, int]:
    """Sort key of a prefill that still has tokens to compute."""
    wait_s = now_s - entry.queued_s
    return (-entry.request.priority, -wait_s / entry.remaining, entry.remaining, entry.sequence)


def share_out(prefills: Sequence[tuple[int, int]], budget: int, page_tokens: int) -> list[int]:
    """Tokens for each prefill (start, remaining), best first: an equal share each, then the rest to the best.

    A share is at least one page. A chunk that does not finish its prompt ends on a page border where it can: whole
    pages are what is handed over and cached. Sum <= budget; 0 = not in this step.
    """
    counts = [0] * len(prefills)
    share = max(page_tokens, budget // max(1, len(prefills)))
    for limit in (share, budget):
        for index, (start, remaining) in enumerate(prefills):
            count = min(remaining, max(limit, counts[index]), budget + counts[index])
            if count < remaining:
                border = (start + count) // page_tokens * page_tokens
                if border > start + counts[index]:
                    count = border - start
                elif counts[index]:
                    continue
            budget -= count - counts[index]
            counts[index] = count
    return counts


def retry_after_ms(waiting_tokens: int, tokens_per_s: float) -> int:
    """When the waiting work of now will be done, at the speed of now; between 50 ms and 10 s."""
    if tokens_per_s <= 0:
        return 1000
    return int(min(RETRY_MAX_MS, max(RETRY_MIN_MS, 1000 * waiting_tokens / tokens_per_s)))
