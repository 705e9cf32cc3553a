"""A chat over the OpenAI API: one streamed answer at a time, with what it cost. Knows no terminal."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from baton_common.clock import Clock
from baton_common.errors import BatonError

_CONNECT_TIMEOUT_S = 5.0
_SILENCE_TIMEOUT_S = 120.0    # between two pieces of an answer
_DATA = "data:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """None = the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one answer. Tokens are None when the server does not tell."""

    ttft_s: float
    total_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    finish_reason: str

    @property
    def tokens_per_s(self) -> float | None:
        """Of decode: tokens after the first, over the time after the first."""
        if self.completion_tokens is None or self.completion_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.ttft_s)

    def __str__(self) -> str:
        parts = [f"TTFT {self.ttft_s * 1000:.0f} ms"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if self.completion_tokens is not None:
            parts.append(f"{self.completion_tokens} tokens")
        if self.prompt_tokens is not None:
            parts.append(f"prompt {self.prompt_tokens}, cached {self.cached_tokens or 0}")
        if self.finish_reason == "length":
            parts.append("cut off at the token limit")
        return " · ".join(parts)


class ChatFailed(BatonError):
    """The answer did not come, or not to its end; the message says what to do."""


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    delta: _Delta
    finish_reason: str | None = None


class _Fault(BaseModel):
    message: str


class _Chunk(BaseModel):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Fault | None = None


class ChatClient:
    """Keeps one connection. `last_cost` is that of the last answer that was read to its end."""

    def __init__(self, url: str, clock: Clock, *, api_key: str = "") -> None:
        self._url = url.rstrip("/")
        self._clock = clock
        self.last_cost: Cost | None = None
        loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(_SILENCE_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            trust_env=not loopback,    # a proxy cannot reach this machine's own loopback
        )

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """Name of the first model served. Raises ChatFailed."""
        try:
            answer = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.status_code != httpx.codes.OK:
            raise ChatFailed(_fault(answer.status_code, answer.text))
        names = [item["id"] for item in answer.json()["data"]]
        if not names:
            raise ChatFailed(f"{self._url} serves no model")
        return str(names[0])

    def ask(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        """Stream the answer, piece by piece; afterwards `last_cost` is set. Closing the generator aborts the answer.

        Raises ChatFailed, before the first piece or after any.
        """
        body: dict[str, object] = {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        wanted = {
            "max_completion_tokens": sampling.max_tokens, "temperature": sampling.temperature, "seed": sampling.seed,
        }  # fmt: skip
        body.update({key: value for key, value in wanted.items() if value is not None})
        started_s = self._clock.now()
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise ChatFailed(_fault(answer.status_code, answer.read().decode(errors="replace")))
                yield from self._pieces(answer.iter_lines(), started_s)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _pieces(self, lines: Iterator[str], started_s: float) -> Iterator[str]:
        first_s: float | None = None
        last_s = started_s
        usage: _Usage | None = None
        finish = ""
        for chunk in _chunks(lines):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    last_s = self._clock.now()
                    first_s = last_s if first_s is None else first_s
                    yield choice.delta.content
        details = usage.prompt_tokens_details if usage else None
        self.last_cost = Cost(
            ttft_s=(last_s if first_s is None else first_s) - started_s, total_s=last_s - started_s,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            completion_tokens=usage.completion_tokens if usage else None, finish_reason=finish,
        )  # fmt: skip

    def _unreachable(self, error: httpx.HTTPError) -> ChatFailed:
        if isinstance(error, httpx.ConnectError):
            return ChatFailed(f"nothing answers at {self._url}; start a service with `baton up`, or give its --url")
        if isinstance(error, httpx.TimeoutException):
            return ChatFailed(f"{self._url} was silent for too long; see `baton status`")
        return ChatFailed(f"{self._url} broke the connection ({error}); see `baton status`")


def _chunks(lines: Iterator[str]) -> Iterator[_Chunk]:
    """Chunks of a server-sent event stream up to its [DONE]. Raises ChatFailed when it ends otherwise."""
    for line in lines:
        if not line.startswith(_DATA):
            continue
        data = line[len(_DATA) :].strip()
        if data == "[DONE]":
            return
        try:
            chunk = _Chunk.model_validate_json(data)
        except ValidationError:
            raise ChatFailed(f"the server sent something that is no answer: {data[:100]}") from None
        if chunk.error is not None:
            raise ChatFailed(chunk.error.message)
        yield chunk
    raise ChatFailed("the connection ended before the answer did; see `baton status`")


def _fault(status: int, text: str) -> str:
    try:
        return f"{json.loads(text)['error']['message']} (HTTP {status})"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {' '.join(text.split())[:200]}"
