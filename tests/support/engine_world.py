"""A real engine on a tiny model, with a role that records what it hears; used by the tests of the engine.

Every world checks at its end that no page, row or request is left, whatever the test did with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.config import EngineConfig
from baton_engine.engine import Engine
from baton_engine.exec.device import Device, open_device
from baton_engine.models.loader import LoadedModel, load_model
from baton_engine.request import Mode, Request, SamplingParams
from baton_engine.role import Fence, TokenOut
from baton_engine.step import StepPlan

TIMEOUT_S = 30.0
_ids = count()


class Done:
    def done(self) -> bool:
        return True


class RecordingRole:
    """Keeps every hook's arguments; `heard` is notified after each."""

    def __init__(self) -> None:
        self.heard = threading.Condition()
        self.tokens: dict[RequestId, list[TokenOut]] = {}
        self.ended: dict[RequestId, BatonError | None] = {}
        self.hooks: list[tuple[Any, ...]] = []
        self.steps: list[int] = []
        self.known: set[PageHash] = set()

    def _note(self, *what: Any) -> None:
        with self.heard:
            self.hooks.append(what)
            self.heard.notify_all()

    def names(self, request_id: RequestId) -> list[str]:
        """Hooks that were called for one request, in order."""
        return [name for name, request, *_ in self.hooks if request is not None and request.request_id == request_id]

    def wants_fill(self, request: Request) -> bool:
        return False

    def on_fill(
        self, request: Request, pages: Sequence[PageId], hashes: Sequence[PageHash], have_tokens: int
    ) -> None:
        self._note("on_fill", request, tuple(pages), tuple(hashes), have_tokens)

    def wants_pages(self) -> bool:
        return False

    def on_pages(self, hashes: Sequence[PageHash], pages: Sequence[PageId]) -> Fence | None:
        self._note("on_pages", None, tuple(hashes), tuple(pages))
        return None

    def unsent_tokens(self) -> int:
        return 0

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        self._note("on_reserved", request, tuple(pages), first_missing_token)

    def on_local(self, request: Request) -> None:
        self._note("on_local", request)

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        self._note("on_prefill_admitted", request, tuple(pages), computed_tokens)

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        self._note("on_layers", None, plan, layer_begin, layer_end)

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        self._note("on_prefill_done", request, first)

    def on_tokens(self, step: int, tokens: Sequence[TokenOut]) -> None:
        self.steps.append(step)
        for token in tokens:
            self.tokens.setdefault(token.request_id, []).append(token)
        self._note("on_tokens", None, step, tuple(tokens))

    def release_kv(self, request: Request, error: BatonError | None) -> Fence:
        self._note("release_kv", request, error)
        return Done()

    def on_kv_events(self, stored: Sequence[PageHash], removed: Sequence[PageHash]) -> None:
        self.known = (self.known | set(stored)) - set(removed)
        self._note("on_kv_events", None, tuple(stored), tuple(removed))

    def on_ended(self, request: Request, error: BatonError | None) -> None:
        assert request.request_id not in self.ended, f"{request.request_id} ended twice"
        self.ended[request.request_id] = error
        self._note("on_ended", request, error)

    def wait(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        with self.heard:
            assert self.heard.wait_for(condition, timeout_s), "the engine did not answer"


@dataclass(kw_only=True)
class World:
    engine: Engine
    role: Any
    device: Device
    crashes: list[tuple[BaseException, Mapping[str, object]]] = field(default_factory=list)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(request)

    def wait(self, *requests: Request) -> None:
        self.role.wait(lambda: all(request.request_id in self.role.ended for request in requests))

    def run(self, requests: Iterable[Request]) -> list[list[int]]:
        """Submit all, wait for all, and return their outputs; every one must end without error."""
        everyone = list(requests)
        self.submit(*everyone)
        self.wait(*everyone)
        assert {request.request_id: self.role.ended[request.request_id] for request in everyone} == {
            request.request_id: None for request in everyone
        }
        return [self.output(request) for request in everyone]

    def output(self, request: Request) -> list[int]:
        """Token ids in order; their positions must be without gaps or doubles."""
        tokens = self.role.tokens.get(request.request_id, [])
        first = tokens[0].position if tokens else 0
        assert [token.position for token in tokens] == list(range(first, first + len(tokens)))
        return [token.token_id for token in tokens]

    def settle(self) -> None:
        """Wait until nothing is in flight, then check that nothing is left."""
        done = threading.Event()
        for _ in range(1000):
            stats = self.engine.stats()
            if stats.empty and not (stats.leased_pages or stats.in_flight_pages or stats.running):
                break
            done.wait(0.005)
        stats = self.engine.stats()
        assert stats.empty
        assert (stats.running, stats.reserved, stats.sending, stats.queued_requests) == (0, 0, 0, 0)
        assert (stats.leased_pages, stats.in_flight_pages) == (0, 0)
        assert stats.free_pages + stats.cached_pages == stats.total_pages
        assert set(self.engine._scheduler.cached_hashes()) == self.role.known


def tiny_model(folder: Path) -> LoadedModel:
    device = open_device("cpu", threads=1)
    try:
        return load_model(folder, device=device, dtype="float32")
    finally:
        device.close()


@contextmanager
def engine_world(
    model: LoadedModel, role: Any = None, *, crashes_expected: bool = False, settles: bool = True, **settings: Any
) -> Iterator[World]:
    """A started engine. Settings are EngineConfig's; small by default."""
    device = open_device("cpu", threads=1)
    small = {
        "dtype": "float32",
        "page_tokens": 16,
        "max_rows": 8,
        "step_tokens": 64,
        "pages": 128,
        "invariant_every": 1,
    }
    crashes: list[tuple[BaseException, Mapping[str, object]]] = []
    role = role or RecordingRole()
    engine = Engine(
        model, EngineConfig(**{**small, "context_tokens": 512, **settings}), device, role, SystemClock(),
        lambda error, dump: crashes.append((error, dump)),
    )  # fmt: skip
    world = World(engine=engine, role=role, device=device, crashes=crashes)
    engine.start()
    try:
        yield world
        if settles and not crashes_expected:
            world.settle()
    finally:
        engine.stop()
        device.close()
    assert bool(crashes) == crashes_expected, crashes


def make_request(
    prompt: Sequence[int], *, mode: Mode = Mode.LOCAL, outputs: Sequence[int] = (), **options: Any
) -> Request:
    """Greedy unless told otherwise; options of SamplingParams and of Request are told apart by name."""
    own = {name: options.pop(name) for name in list(options) if name in Request.__dataclass_fields__}
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **options})
    now_s = SystemClock().now()
    values = {
        "request_id": RequestId(f"request-{next(_ids)}"), "deadline_s": now_s + TIMEOUT_S, "arrival_s": now_s, **own,
    }  # fmt: skip
    return Request(mode=mode, tokens=[*prompt, *outputs], prompt_tokens=len(prompt), sampling=sampling, **values)
