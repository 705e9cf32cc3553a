"""What a role adds to the engine: a strategy object with a few hooks, so that one engine serves all roles.

The engine knows modes of requests (LOCAL, PREFILL, RESERVE), never transports or gRPC; a role binds them to those.
Hooks run on the engine thread unless they say otherwise; none may block, none may raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import FinishReason, Request
from baton_engine.step import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Of one sampled token, after penalties and bias, before temperature and truncation; `top` is best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """One output token of one request."""

    request_id: RequestId
    position: int  # 0 = first output token of the request's whole life
    token_id: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int | None = None  # with the first token that this worker makes


class Fence(Protocol):
    """Something may still touch pages until `done()` is true. Never false again; polled, so cheap."""

    def done(self) -> bool: ...


class Role(Protocol):
    """Engine -> outside."""

    def wants_fill(self, request: Request) -> bool:
        """Whether KV of its prompt may come from elsewhere before it is computed. Asked once, when it is submitted;
        `request.hashes` has the full pages that may be filled. If some of them are not in the tree when it is admitted,
        on_fill follows (not when too many requests fill already: then everything missing is computed).
        """

    def on_fill(self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int) -> None:
        """FILLING: `pages` (the whole prompt's table) are leased, KV of [0, have_tokens) is in them.

        `hashes[i]` names the full page `pages[i]`: those may be filled; at least the last token is always computed.
        Answer once, with Engine.kv_filled; nothing may write into the pages after that. If the request ends before,
        release_kv is called instead. A preempted request is filled again at its next admission.
        """

    def wants_pages(self) -> bool:
        """Whether on_pages is to be called at all. Asked once, when the engine starts."""

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        """These full pages are complete and in the prefix tree: just written, or found once more by another request.

        `hashes[i]` names `pages[i]`; pages of several requests may be in one call. They hold still until the fence is
        done; None: nobody will read them.
        """

    def unsent_tokens(self) -> int:
        """KV that was announced (on_prefill_admitted, on_layers) and has not left this worker, in tokens of all layers.

        Asked before every plan while there are announced requests: cheap. Far ahead, no PREFILL request is admitted.
        """

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        """RESERVE: `pages` (the whole prompt's table) are leased; KV of [first_missing_token, prompt end) is wanted.

        The request was in RESERVED before this call. Answer later with Engine.kv_received or Engine.kv_failed.
        """

    def on_local(self, request: Request) -> None:
        """RESERVE turned into LOCAL because little enough is uncached: no KV will be wanted."""

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        """PREFILL: pages of the whole prompt; KV of [0, computed_tokens) is in them already (prefix hit)."""

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        """KV of these layers is in the pool for every token of the plan. Runs on the device thread, in layer order.

        Only for steps with work of a PREFILL request; may still name one that release_kv was called for.
        """

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        """PREFILL: token #1 exists; the request is in SENDING and keeps its pages until Engine.handoff_done.

        Not called when token #1 finished the request; then only on_tokens and release_kv are.
        """

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        """All tokens of one step, in one call."""

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        """The request is over, its pages are to be freed once the fence is done.

        Must cause that no new gather or scatter on the pages starts. Called once, for every request (LOCAL too) that
        ends between on_fill and kv_filled, and for every one that reached on_prefill_admitted or on_reserved, handed
        over or not. A RESERVE request that is preempted after its KV arrived gets the call then (error None): it goes
        on as LOCAL. A LOCAL request that is filled after that may get it a second time.
        """

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        """The prefix tree changed; at most once per step."""

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        """The request owns nothing any more (FREED). Exactly once per submitted request."""
