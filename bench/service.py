"""The whole house under measurement: `baton up` in a folder of its own, streams through the router, memory.

Handover is what a client sees of it: the time from token #1 (made by prefill) to token #2 (made by decode) less one
decode step, the median of the later gaps of the same answer.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from bench.report import Report, Row

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent


class Service:
    """One running `baton up --detach`."""

    def __init__(self, url: str, model: str, processes: Sequence[psutil.Process]) -> None:
        self.url = url
        self.model = model
        self.processes = tuple(processes)

    def resident_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self.processes)

    def gaps(self, prompt: list[int], outputs: int) -> list[float]:
        """Seconds from request to token #1, then between tokens, as the client sees them."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": outputs, "temperature": 0, "stream": True,
            "ignore_eos": True, "logprobs": 0,
        }  # fmt: skip
        stamps = [time.perf_counter()]
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=900) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.read().decode()}")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    stamps.extend([time.perf_counter()] * _tokens(json.loads(line[6:])))
        return [after - before for before, after in itertools.pairwise(stamps)]


def _tokens(event: dict[str, object]) -> int:
    """How many tokens an event carries: text may be held back, log-probabilities are one per token."""
    choices = event.get("choices") or []
    if not isinstance(choices, list):
        raise TypeError(f"choices is {choices!r}")
    return sum(len((choice.get("logprobs") or {}).get("tokens") or ()) for choice in choices)


@contextmanager
def running(model: Path, state: Path, *, port: int, flags: Sequence[str] = ()) -> Iterator[Service]:
    """Starts a service and takes it down again, whatever happens."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    up = [str(SCRIPTS / "baton"), "up", str(model), "--detach", "--name", "bench", "--port", str(port), *flags]
    try:
        subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
        document = json.loads((state / "baton" / "bench" / "state.json").read_text())
        processes = [psutil.Process(entry["pid"]) for entry in document["processes"]]
        yield Service(document["url"], document["model"], processes)
    finally:
        down = [str(SCRIPTS / "baton"), "down", "--name", "bench"]
        subprocess.run(down, env=environment, check=False, stdout=subprocess.DEVNULL)


def measure_handover(report: Report, service: Service, *, prompt_tokens: int, requests: int, alone_s: float) -> None:
    """TTFT through the router against the engine alone, and what the handover adds to the second token."""
    chance = random.Random(1)
    first, handover = [], []
    for _ in range(requests):
        prompt = [chance.randrange(1000, 150_000) for _ in range(prompt_tokens)]
        to_first, to_second, *later = service.gaps(prompt, 8)
        first.append(to_first)
        handover.append((to_second - statistics.median(later)) * 1e3)
    ttft = statistics.median(first)
    report.add(
        Row(name=f"TTFT through the router, {prompt_tokens} tokens", value=prompt_tokens / ttft, unit="tok/s",
            ceiling=prompt_tokens / alone_s, ceiling_name="engine alone", note=f"p50 {ttft * 1e3:.0f} ms")
    )  # fmt: skip
    report.add(
        Row(name="handover − transfer − one step, p50", value=statistics.median(handover), unit="ms", goal=20.0,
            lower_is_better=True, note=f"{requests} requests, max {max(handover):.1f} ms, transfer not subtracted")
    )  # fmt: skip


def measure_memory(report: Report, service: Service, *, requests: int, warm_up: int) -> None:
    """Resident memory of router + prefill + decode on the demo model, and its growth over many requests."""
    questions = ("What is a page?", "Hello!", "What is the capital of France?", "What does the router do?")

    def ask(index: int) -> None:
        message = {"role": "user", "content": f"{questions[index % len(questions)]} ({index})"}
        body = {"model": service.model, "messages": [message], "max_tokens": 4}
        httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(warm_up)))
        before = service.resident_bytes()
        start = time.perf_counter()
        list(pool.map(ask, range(warm_up, warm_up + requests)))
        seconds = time.perf_counter() - start
    after = service.resident_bytes()
    report.add(
        Row(name="resident memory, router + prefill + decode", value=after / 1e9, unit="GB", goal=2.0,
            lower_is_better=True, note=f"demo model, after {warm_up + requests} requests")
    )  # fmt: skip
    report.add(
        Row(name=f"growth over {requests} requests", value=(after - before) / 1e6, unit="MB", goal=20.0,
            lower_is_better=True, note=f"{requests / seconds:.0f} requests/s")
    )  # fmt: skip
