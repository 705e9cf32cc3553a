"""An engine without a model, behind the same door: tokens follow from a formula, time from its own thread.

Output i of a request is `expected_token(prompt, i)`. RESERVE leases pages and waits for kv_received; PREFILL makes one
token and waits for handoff_done. Every hook is called as `baton_engine.role.Role` says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from baton_common.errors import BatonError, Draining
from baton_common.ids import PageId, RequestId, RowId
from baton_engine.engine import EngineStats
from baton_engine.request import FinishReason, Mode, Request
from baton_engine.role import Role, TokenLogprobs, TokenOut
from baton_engine.step import Form, RowWork, StepPlan

VOCAB = 1000
PAGES = 500
PAGE_TOKENS = 16
LAYERS = 4


def expected_token(prompt: Sequence[int], position: int) -> int:
    return (sum(prompt) * 31 + position * 7 + 1) % VOCAB


@dataclass
class _Live:
    request: Request
    prompt: list[int]
    running: bool
    fence: object = None
    error: BatonError | None = None
    over: bool = False
    first: bool = True


@dataclass
class ScriptedEngine:
    """`step_s` paces it; clear `may_step` and it stands still with its work."""

    role: Role
    step_s: float = 0.001
    steps: int = 0
    may_step: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_step.set()
        self._inbox: SimpleQueue[tuple[str, RequestId, object]] = SimpleQueue()
        self._live: dict[RequestId, _Live] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    # ---- door -------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def submit(self, request: Request) -> None:
        self._inbox.put(("submit", request.request_id, request))

    def abort(self, request_id: RequestId, error: BatonError) -> None:
        self._inbox.put(("fail", request_id, error))

    def kv_filled(self, request_id: RequestId, tokens: int) -> None:
        self._inbox.put(("filled", request_id, tokens))

    def kv_receiving(self, request_id: RequestId) -> None:
        self._inbox.put(("receiving", request_id, None))

    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self._inbox.put(("received", request_id, token_id))

    def kv_failed(self, request_id: RequestId, error: BatonError) -> None:
        self._inbox.put(("fail", request_id, error))

    def handoff_done(self, request_id: RequestId) -> None:
        self._inbox.put(("done", request_id, None))

    def handoff_failed(self, request_id: RequestId, error: BatonError) -> None:
        self._inbox.put(("fail", request_id, error))

    def stats(self) -> EngineStats:
        live = list(self._live.values())
        running = sum(item.running for item in live)
        return EngineStats(
            steps=self.steps,
            empty=not live,
            queued_requests=0,
            queued_tokens=0,
            running=running,
            reserved=len(live) - running,
            sending=0,
            preemptions=0,
            free_pages=PAGES - len(live),
            cached_pages=0,
            leased_pages=len(live),
            in_flight_pages=0,
            total_pages=PAGES,
            step_ms=1.0,
            prefill_tokens_per_s=0.0,
        )

    # ---- engine thread ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._stop.is_set():
            self._drain()
            if self.may_step.is_set():
                self._step()
            self._retire()
            time.sleep(self.step_s)
        for item in list(self._live.values()):
            self._end(item, Draining("stopped"))
            self._live.pop(item.request.request_id)
            self.role.on_ended(item.request, item.error)

    def _drain(self) -> None:
        while True:
            try:
                kind, request_id, value = self._inbox.get_nowait()
            except Empty:
                return
            item = self._live.get(request_id)
            if kind == "submit":
                assert isinstance(value, Request)
                self._submit(value)
            elif item is None or item.over:
                continue
            elif kind == "fail":
                assert isinstance(value, BatonError)
                self._end(item, value)
            elif kind == "received":
                assert isinstance(value, int)
                item.request.tokens.append(value)
                item.running = True
            elif kind == "done":
                self._end(item, None)

    def _submit(self, request: Request) -> None:
        item = _Live(request=request, prompt=list(request.tokens), running=request.mode is not Mode.RESERVE)
        self._live[request.request_id] = item
        pages = tuple(PageId(page) for page in range(-(-len(request.tokens) // PAGE_TOKENS)))
        if request.mode is Mode.PREFILL:
            self.role.on_prefill_admitted(request, pages, 0)
        elif request.mode is Mode.RESERVE and len(request.tokens) < request.local_below_tokens:
            request.mode, item.running = Mode.LOCAL, True
            self.role.on_local(request)
        elif request.mode is Mode.RESERVE:
            self.role.on_reserved(request, pages, 0)

    def _step(self) -> None:
        batch = [item for item in self._live.values() if item.running and not item.over]
        if not batch:
            return
        self.steps += 1
        tokens = [self._next(item) for item in batch]
        self.role.on_tokens(self.steps, tokens)
        for item, token in zip(batch, tokens, strict=True):
            if token.finish is not None:
                self._end(item, None)
            elif item.request.mode is Mode.PREFILL:
                item.running = False
                self._announce(item)
                self.role.on_prefill_done(item.request, token)

    def _next(self, item: _Live) -> TokenOut:
        request = item.request
        position = request.output_tokens
        token_id = expected_token(item.prompt[: request.prompt_tokens], position)
        request.tokens.append(token_id)
        first, item.first = item.first, False
        return TokenOut(
            request_id=request.request_id,
            position=position,
            token_id=token_id,
            finish=FinishReason.LENGTH if request.output_tokens >= request.sampling.max_tokens else None,
            cached_tokens=0 if first else None,
        )

    def _announce(self, item: _Live) -> None:
        work = RowWork(
            request_id=item.request.request_id, row=RowId(0), start=0, count=len(item.prompt), sample=True,
            output_position=0, input_ids=tuple(item.prompt), first_new_page=0, new_pages=(),
        )  # fmt: skip
        plan = StepPlan(number=self.steps, form=Form.RAGGED, admissions=(), work=(work,))
        for layer in range(0, LAYERS, 2):
            self.role.on_layers(plan, layer, layer + 2)

    def _end(self, item: _Live, error: BatonError | None) -> None:
        item.over, item.error, item.running = True, error, False
        if item.request.mode is not Mode.LOCAL:
            item.fence = self.role.release_kv(item.request, error)

    def _retire(self) -> None:
        for item in [item for item in self._live.values() if item.over]:
            if item.fence is None or item.fence.done():  # type: ignore[attr-defined]
                del self._live[item.request.request_id]
                self.role.on_ended(item.request, item.error)
