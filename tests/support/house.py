"""A whole house under fault: clients that stream through a real router, and what the survivors say afterwards."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import httpx
from support.processes import WorkerProcess

from baton_proto import worker_pb2, worker_pb2_grpc

DEADLINE_S = 60.0


@dataclass
class Stream:
    """What one client of /v1/completions saw. `error` is a typed error object, or how the connection broke."""

    status: int = 0
    text: str = ""
    finish: str = ""
    completion_tokens: int = 0
    error: str = ""
    seconds: float = 0.0


@dataclass
class Streams:
    """Several clients at once. `events` counts what they received together, so that a fault can be timed by it.

    Each set of clients has a cache salt of its own: what earlier ones left in the caches would spare prefill its work.
    """

    url: str
    prompts: Sequence[Sequence[int]]
    outputs: int
    extra: dict[str, object] = field(default_factory=dict)
    salt: str = field(default_factory=lambda: secrets.token_hex(8))
    events: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _answers: list[Future[Stream]] = field(default_factory=list)

    @contextmanager
    def running(self):
        """The clients start with the block; `answers()` inside it waits for all."""
        with ThreadPoolExecutor(len(self.prompts)) as pool:
            self._answers = [pool.submit(self._one, list(prompt)) for prompt in self.prompts]
            yield self

    def wait_events(self, count: int) -> None:
        """Until so many events arrived over all streams."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.events >= count, DEADLINE_S), f"only {self.events} events came"

    def answers(self) -> list[Stream]:
        return [answer.result(DEADLINE_S + 30) for answer in self._answers]

    def _one(self, prompt: list[int]) -> Stream:
        seen = Stream()
        start = time.monotonic()
        body = {
            "model": "model", "prompt": prompt, "max_tokens": self.outputs, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}, "cache_salt": self.salt,
            **self.extra,
        }  # fmt: skip
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=DEADLINE_S + 20) as answer:
                seen.status = answer.status_code
                if seen.status != 200:
                    seen.error = answer.read().decode()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(seen, json.loads(line[6:]))
        except httpx.HTTPError as error:
            seen.error = f"connection: {error!r}"
        seen.seconds = time.monotonic() - start
        return seen

    def _take(self, seen: Stream, event: dict) -> None:
        if "error" in event:
            seen.error = json.dumps(event["error"])
        for choice in event.get("choices", ()):
            seen.text += choice["text"]
            seen.finish = choice.get("finish_reason") or seen.finish
        if event.get("usage"):
            seen.completion_tokens = event["usage"]["completion_tokens"]
        with self._changed:
            self.events += 1
            self._changed.notify_all()


def status(worker: WorkerProcess) -> worker_pb2.StatusReply:
    """What the worker's admin service says of itself."""
    with grpc.insecure_channel(worker.address) as channel:
        return worker_pb2_grpc.AdminStub(channel).Status(worker_pb2.StatusRequest(), timeout=10)


def eventually(condition: Callable[[], bool], within_s: float, what: Callable[[], str]) -> None:
    """Polls; fails with `what()` after `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


def assert_no_leaks(workers: Sequence[WorkerProcess], within_s: float = 15.0) -> None:
    """Every page of every worker is free or cached: nobody holds one, nothing is in flight."""
    for worker in workers:

        def clean(worker: WorkerProcess = worker) -> bool:
            pages = status(worker).pages
            return pages.total > 0 and pages.free + pages.cached == pages.total

        eventually(clean, within_s, lambda worker=worker: f"{worker.name}: {status(worker)}\n{worker.log()[-3000:]}")
