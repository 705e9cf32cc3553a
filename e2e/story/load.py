"""Sixteen clients that stream through the Service by the `openai` package and compare each answer with the undisturbed.

Every request has a cache salt of its own, so that long prompts are computed and handed over each time; answers are
greedy, hence the same whatever happens to the pods. The client's own retries are off: each failure counts.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import openai

MODEL = "baton-demo"
STREAMS = 16
OUTPUT_TOKENS = 96
PATIENCE_S = 120.0  # of a client; a slow machine is no error
LONG = " ".join(["What is a page?"] * 20)  # longer than what decode computes itself
SUBJECTS = ("a page", "prefill", "decode", "a handoff", "a router", "a prefix", "the KV cache", "a step")


def questions() -> list[str]:
    """One per client. Even ones are longer than what decode computes itself, and so are prefilled elsewhere."""
    found = []
    for index in range(STREAMS):
        subject = SUBJECTS[index % len(SUBJECTS)]
        words = 10 + index if index % 2 == 0 else 1
        found.append(" ".join(f"What is {subject}?" for _ in range(words)))
    return found


def _request(question: str, *, tokens: int = OUTPUT_TOKENS, salt: str = "") -> dict[str, object]:
    return {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": tokens,
        "extra_body": {"ignore_eos": True, "cache_salt": salt or secrets.token_hex(8)},
    }  # fmt: skip


@contextmanager
def client(url: str) -> Iterator[openai.OpenAI]:
    """A client with connections of its own and no retries."""
    with httpx.Client(trust_env=False) as connections:
        yield openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S, http_client=connections
        )


def ask(url: str, question: str, *, tokens: int = OUTPUT_TOKENS, salt: str = "") -> str:
    """One whole answer. Requests with one `salt` share caches; none = with nobody. Raises openai.OpenAIError."""
    with client(url) as asking:
        answer = asking.chat.completions.create(**_request(question, tokens=tokens, salt=salt))  # type: ignore[call-overload]
    return str(answer.choices[0].message.content)


def ask_streamed(url: str, question: str, *, tokens: int = OUTPUT_TOKENS) -> list[str]:
    """The pieces of an answer. Raises openai.OpenAIError."""
    with client(url) as asking:
        stream = asking.chat.completions.create(**_request(question, tokens=tokens), stream=True)  # type: ignore[call-overload]
        return [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one client saw that should not be. `at_s`: since the load began."""

    client: int
    at_s: float
    what: str


@dataclass(slots=True, kw_only=True)
class Load:
    """`expected`: the undisturbed answer to each question."""

    url: str
    questions: Sequence[str]
    expected: Sequence[str]
    faults: list[Fault] = field(default_factory=list)
    answers: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _first: list[bool] = field(default_factory=list)
    _finished: list[float] = field(default_factory=list)  # per client: when its newest right answer had begun
    _began_s: float = 0.0

    @classmethod
    def of(cls, url: str, asked: Sequence[str]) -> Load:
        """The service must be undisturbed: what it answers now is what counts as right."""
        return cls(url=url, questions=asked, expected=[ask(url, question) for question in asked])

    @contextmanager
    def running(self) -> Iterator[Load]:
        """The block begins when every client receives, and ends when each has begun and finished an answer after it."""
        self._stop.clear()
        self.faults, self.answers, self._began_s = [], 0, time.monotonic()
        self._first, self._finished = [False] * len(self.questions), [0.0] * len(self.questions)
        thread = threading.Thread(target=lambda: asyncio.run(self._clients()), name="load", daemon=True)
        thread.start()
        try:
            self._wait(lambda: all(self._first))
            yield self
            end_s = time.monotonic()
            self._wait(lambda: min(self._finished) > end_s)
        finally:
            self._stop.set()
            thread.join(PATIENCE_S + 30)

    @contextmanager
    def undisturbed_by(self, what: str) -> Iterator[Load]:
        """`running`, and afterwards: nobody saw an error, a wrong or a short answer."""
        with self.running():
            yield self
        seconds = time.monotonic() - self._began_s
        print(f"\n{what}: {self.answers} answers to {len(self.questions)} clients in {seconds:.0f} s, "
              f"{len(self.faults)} errors", flush=True)  # fmt: skip
        assert not self.faults, f"{what}: {len(self.faults)} errors, {self.answers} answers; first: {self.faults[:3]}"

    def _wait(self, ok) -> None:
        """Faults end the waiting too: the caller judges them."""
        end = time.monotonic() + PATIENCE_S
        while not ok() and not self.faults and time.monotonic() < end:
            time.sleep(0.05)

    async def _clients(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, limits=limits) as connections:
            asking = openai.AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S, http_client=connections
            )
            await asyncio.gather(*(self._client(asking, index) for index in range(len(self.questions))))

    async def _client(self, asking: openai.AsyncOpenAI, index: int) -> None:
        for turn in itertools.count(index):
            if self._stop.is_set():
                return
            number = turn % len(self.questions)
            began_s = time.monotonic()
            try:
                fault = await self._answer(asking, index, number)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                fault = f"{type(error).__name__}: {error}" + (f" from {error.__cause__!r}" if error.__cause__ else "")
            if fault:
                self.faults.append(Fault(client=index, at_s=time.monotonic() - self._began_s, what=fault))
                await asyncio.sleep(0.2)
            else:
                self.answers += 1
                self._finished[index] = began_s

    async def _answer(self, asking: openai.AsyncOpenAI, index: int, number: int) -> str:
        """What is wrong with the answer; empty: nothing."""
        text, finish = "", ""
        stream = await asking.chat.completions.create(**_request(self.questions[number]), stream=True)  # type: ignore[call-overload]
        async for chunk in stream:
            self._first[index] = True
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        if finish != "length":
            return f"ended with {finish or 'nothing'} after {text!r}"
        expected = self.expected[number]
        return "" if text == expected else f"wrong answer to {number}: {text!r} instead of {expected!r}"
