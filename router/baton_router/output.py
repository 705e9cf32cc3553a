"""Tokens of one choice to what may be shown: text, logprobs, finish reason.

Text is held back while it may be half a character or the beginning of a stop string; logprobs wait for their text, so
that nothing of a stop string shows. Fed by a flight, emptied by the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError
from baton_proto import worker_pb2 as wire
from baton_router.detokenise import Vocabulary
from baton_router.links import Token
from baton_router.metrics import RouterMetrics
from baton_router.stops import StopFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownLogprob:
    """One token's logprobs; `offset` is where its text begins in the choice's text."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What became showable since the last look."""

    text: str
    logprobs: tuple[ShownLogprob, ...]
    finish_reason: str | None


class ChoiceOutput:
    """Sink of one flight."""

    def __init__(
        self,
        index: int,
        *,
        vocabulary: Vocabulary,
        stops: Sequence[str],
        skip_special: bool,
        continues: bool,
        lead: str,
        started_s: float,
        now: Callable[[], float],
        metrics: RouterMetrics,
        wake: Callable[[ChoiceOutput], None],
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.error: BatonError | None = None
        self.output_tokens = 0
        self.cached_tokens = 0
        self.opened = False  # the response has sent this choice's first chunk
        self.halt: Callable[[str], None] = lambda reason: None  # set by the owner: ends the flight
        self._detokeniser = vocabulary.detokeniser(skip_special=skip_special, continues=continues)
        self._stops = StopFilter(stops)
        self._text = lead
        self._pushed = len(lead)  # characters that went into the stop filter
        self._shown = len(lead)  # characters that came out of it
        self._waiting: list[ShownLogprob] = []
        self._now = now
        self._last_s = started_s
        self._metrics = metrics
        self._wake = wake

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def on_output(self, token: Token) -> None:
        if self.ended:
            return
        self._measure(token)
        stopped_by_id = token.finish == wire.FINISH_REASON_STOP
        text = "" if stopped_by_id else self._detokeniser.push(token.token_id)
        if token.logprobs is not None and not stopped_by_id:
            top = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
            self._waiting.append(
                ShownLogprob(
                    token_id=token.token_id, logprob=token.logprobs.logprob, top=tuple(top), offset=self._pushed
                )
            )
        if token.finish:
            text += self._detokeniser.flush()
        self._pushed += len(text)
        shown, stopped = self._stops.push(text)
        if stopped:
            self.finish_reason = "stop"
            self.halt("stop string")
        elif token.finish:
            shown += self._stops.flush()
            self.finish_reason = "stop" if stopped_by_id else "length"
        self._shown += len(shown)
        self._text += shown
        if stopped:
            self._waiting = [item for item in self._waiting if item.offset < self._shown]
        self._wake(self)

    def on_error(self, error: BatonError) -> None:
        if not self.ended:
            self.error = error
            self._wake(self)

    def take(self) -> Delta | None:
        """Everything showable since the last call; None when there is nothing."""
        ready = self._ready_logprobs() if self._waiting else ()
        if not self._text and not ready and self.finish_reason is None:
            return None
        text, self._text = self._text, ""
        return Delta(text=text, logprobs=ready, finish_reason=self.finish_reason)

    def _ready_logprobs(self) -> tuple[ShownLogprob, ...]:
        if self.finish_reason is not None:
            ready, self._waiting = tuple(self._waiting), []
            return ready
        count = sum(item.offset < self._shown for item in self._waiting)
        ready, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return ready

    def _measure(self, token: Token) -> None:
        now_s = self._now()
        histogram = self._metrics.itl if self.output_tokens else self._metrics.ttft
        histogram.observe(now_s - self._last_s)
        self._last_s = now_s
        if not self.output_tokens and token.cached_tokens is not None:
            self.cached_tokens = token.cached_tokens
        self.output_tokens += 1
