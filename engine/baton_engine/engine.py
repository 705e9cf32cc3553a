"""The door of the engine: requests in, role hooks out, one thread in between.

One iteration of the engine thread: drain the inbox (blocks only when idle), retire fences, plan step n+1, launch it
behind step n, collect step n, call the hooks, check invariants. Everything that a request owns is touched by this
thread alone; other threads talk to it through the inbox.
It knows modes of requests and nothing of transports, gRPC or roles; see `role.py` for what it tells them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from queue import Empty, SimpleQueue

import torch

from baton_common.clock import Clock
from baton_common.errors import BatonError, Draining, ErrorKind, InvalidRequest
from baton_common.hashing import chain_root
from baton_common.ids import PageHash, RequestId
from baton_engine.config import EngineConfig
from baton_engine.delivery import Delivery
from baton_engine.dump import crash_dump
from baton_engine.exec.device import Device
from baton_engine.exec.pool import KvPool
from baton_engine.exec.runner import STEP_TIMEOUT_S, Runner, StepHandle
from baton_engine.exec.sampler import validate
from baton_engine.exec.sizing import kv_pages
from baton_engine.models.loader import LoadedModel
from baton_engine.request import Phase, Request
from baton_engine.role import Role, TokenLogprobs
from baton_engine.sched.config import SchedulerConfig
from baton_engine.sched.scheduler import Scheduler
from baton_engine.stats import EngineStats, StatsKeeper
from baton_engine.step import StepPlan

__all__ = ["CrashHandler", "Engine", "EngineStats"]

CrashHandler = Callable[[BaseException, Mapping[str, object]], None]
"""Called on the engine thread after it failed: the exception, and a JSON-able dump (last plan, phases, page ledger).
Every request has had its on_ended by then, as far as that was possible."""

Event = Callable[[float], None]  # run on the engine thread, with the time

IDLE_WAIT_S = 1.0  # most that an idle engine sleeps without looking at the clock
STOP_TIMEOUT_S = 10.0  # for steps in flight and the fences of the role; what is left is abandoned
_log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model on one device.

    The role may be called from the moment `start` is called, on the engine thread ("baton-engine") and, for
    `on_layers`, on the device thread. All methods but `start` and `stop` are thread-safe and never block.
    """

    pool: KvPool
    hash_root: PageHash
    """Start of the page-hash chain without cache salt; goes into WorkerHello."""
    context_tokens: int
    """Longest prompt + output that this engine takes; goes into WorkerHello."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        device: Device,
        role: Role,
        clock: Clock,
        on_crash: CrashHandler,
    ) -> None:
        """Allocates the KV pool. ConfigError, naming the setting to change, when it cannot hold one full context."""
        self._config = config
        self._role = role
        self._clock = clock
        self._on_crash = on_crash
        self._vocab = model.spec.vocab_size
        context_tokens = min(config.context_tokens or model.spec.context_tokens, model.spec.context_tokens)
        layout = model.spec.layout(config.page_tokens, model.dtype if config.kv_dtype == "auto" else config.kv_dtype)
        pages = kv_pages(
            config, layout, context_tokens, available=device.available_bytes(), device_fraction=device.kv_fraction
        )
        self.pool = KvPool(layout, pages, device)
        self.hash_root = chain_root(model.digest)
        self._scheduler = Scheduler(
            SchedulerConfig(
                total_pages=self.pool.pages,
                page_tokens=config.page_tokens,
                rows=config.max_rows,
                step_tokens=config.step_tokens,
                context_tokens=context_tokens,
                hash_root=self.hash_root,
                eos_token_ids=frozenset(model.eos_token_ids),
                max_queued=config.max_queue,
                max_reserved=config.max_reserved,
            )
        )
        self.context_tokens = self._scheduler.context_tokens
        self._runner = Runner(
            model.decoder, self.pool, device,
            rows=config.max_rows, context_tokens=context_tokens, vocab=self._vocab,
            eos_token_ids=model.eos_token_ids, layer_group=config.layer_group,
        )  # fmt: skip
        self._inbox: SimpleQueue[Event] = SimpleQueue()
        self._door = threading.Lock()  # guards _closed and _submitted
        self._closed: BatonError | None = None
        self._submitted = 0
        self._thread = threading.Thread(target=self._run, name="baton-engine", daemon=True)
        # Engine thread only, from here on.
        self._delivery = Delivery(role, self._scheduler, clock)
        self._in_flight: StepHandle | None = None
        self._last_plan: StepPlan | None = None
        self._stop_at_s: float | None = None
        self._checked_idle = True
        self._stats = StatsKeeper(self._scheduler.load())

    # ---- any thread -----------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the engine thread. Once."""
        self._thread.start()

    def stop(self) -> None:
        """End everything in flight with Draining and join the thread. Blocks at most for the steps in flight and the
        fences of the role. Safe to call twice; not from a hook. The device stays open: it is the caller's."""
        self._inbox.put(self._begin_stop)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S + STEP_TIMEOUT_S)

    def submit(self, request: Request) -> None:
        """Take a request. The answer, a refusal too, comes through the role: on_ended(request, error).

        After the end of the engine thread that hook runs on the caller's thread.
        """
        with self._door:
            closed = self._closed
            if closed is None:
                self._submitted += 1
                self._inbox.put(partial(self._admit, request))
                return
        _walk_out(request, self._clock.now())
        self._role.on_ended(request, closed)

    def abort(self, request_id: RequestId, error: BatonError) -> None:
        """End a request with `error`. Unknown or ended ids are ignored: an abort may cross an end."""
        self._inbox.put(partial(self._scheduler.abort, request_id, error))

    def kv_filled(self, request_id: RequestId, tokens: int) -> None:
        """FILLING: KV of [0, tokens) is in the pages, and nobody writes into them any more. Answers on_fill, once.

        `tokens`: a page border, at least the `have_tokens` of on_fill, at most its full pages.
        """
        self._inbox.put(partial(self._filled, request_id, tokens))

    def kv_receiving(self, request_id: RequestId) -> None:
        """RESERVE: the first chunk arrived."""
        self._inbox.put(partial(self._scheduler.kv_receiving, request_id))

    def kv_received(self, request_id: RequestId, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """RESERVE: the KV of the prompt is complete and verified; `token_id` is output #1, made by the sender.

        The role gets no on_tokens for it: its client has it already. Decode goes on with output #2.
        Only when our rules end the request with it, on_tokens has it once, with `finish`.
        """
        self._inbox.put(partial(self._scheduler.kv_received, request_id, token_id, logprobs))

    def kv_failed(self, request_id: RequestId, error: BatonError) -> None:
        """RESERVE: no KV will come. The request ends with `error` once `release_kv`'s fence is done."""
        self._inbox.put(partial(self._scheduler.kv_failed, request_id, error))

    def handoff_done(self, request_id: RequestId) -> None:
        """PREFILL: the receiver committed; the request ends without error."""
        self._inbox.put(partial(self._scheduler.handoff_done, request_id))

    def handoff_failed(self, request_id: RequestId, error: BatonError) -> None:
        """PREFILL: the receiver will never commit; the request ends with `error`."""
        self._inbox.put(partial(self._scheduler.handoff_failed, request_id, error))

    def stats(self) -> EngineStats:
        """The state after the last iteration; cheap, no lock on the engine. `empty` is exact."""
        with self._door:
            empty = self._submitted == self._delivery.ended
        return self._stats.snapshot(empty=empty)

    # ---- the loop -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            if self._role.wants_pages():
                self._scheduler.tell_pages()
            with torch.inference_mode():
                while self._iterate():
                    pass
            self._close(Draining("the worker has stopped; retry elsewhere"))
        except BaseException as error:
            self._crash(error)

    def _iterate(self) -> bool:
        """One iteration; false when a stop is complete."""
        scheduler = self._scheduler
        self._take_events(0.0)
        now_s = self._clock.now()
        scheduler.retire(now_s)
        plan = scheduler.plan(now_s, unsent_tokens=self._delivery.unsent_tokens())
        self._delivery.deliver()
        previous, self._in_flight = self._in_flight, None if plan is None else self._launch(plan)
        if previous is not None:
            self._collect(previous)
        elif plan is None:
            return self._idle(now_s)
        return True

    def _launch(self, plan: StepPlan) -> StepHandle:
        self._last_plan = plan
        self._checked_idle = False
        handle = self._runner.launch(plan, self._role.on_layers if self._delivery.sends(plan) else None)
        self._scheduler.launched(plan.number, handle.fence)
        return handle

    def _collect(self, handle: StepHandle) -> None:
        result = handle.collect()
        now_s = self._clock.now()
        self._scheduler.collect(result.number, result.tokens, result.logprobs, now_s)
        self._delivery.deliver()
        self._stats.stepped(handle.plan, result.elapsed_s)
        if self._stats.due(now_s):
            self._stats.refresh(self._scheduler.load(), now_s)
        if result.number % self._config.invariant_every == 0:
            self._scheduler.check()

    def _idle(self, now_s: float) -> bool:
        load = self._scheduler.load()
        self._stats.refresh(load, now_s)
        if not self._checked_idle:
            self._scheduler.check()
            self._checked_idle = True
        if self._stop_at_s is not None and (not self._delivery.live or now_s >= self._stop_at_s):
            return False
        sleep_s = self._scheduler.sleep_s(now_s)
        self._take_events(IDLE_WAIT_S if sleep_s is None else min(sleep_s, IDLE_WAIT_S))
        return True

    def _take_events(self, wait_s: float) -> None:
        """Run what is in the inbox; wait for a first event at most `wait_s`."""
        try:
            event = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            while True:
                event(self._clock.now())
                event = self._inbox.get_nowait()
        except Empty:
            pass

    # ---- events ---------------------------------------------------------------------------------------------------
    def _admit(self, request: Request, now_s: float) -> None:
        try:
            self._check(request)
        except InvalidRequest as error:
            error.request_id = request.request_id
            _walk_out(request, now_s)
            self._delivery.refuse(request, error)
            return
        self._delivery.live[request.request_id] = request
        self._scheduler.name_pages(request)
        request.fills = self._role.wants_fill(request)
        self._scheduler.submit(request, now_s)
        if self._stop_at_s is not None:
            self._scheduler.abort(request.request_id, Draining("the worker stops; retry elsewhere"), now_s)

    def _filled(self, request_id: RequestId, tokens: int, now_s: float) -> None:
        self._delivery.filled(request_id)
        self._scheduler.kv_filled(request_id, tokens, now_s)

    def _check(self, request: Request) -> None:
        """What would break a tensor or a table; lengths and room are the scheduler's."""
        tokens = request.tokens
        if request.request_id in self._delivery.live:
            raise InvalidRequest("a request with this id is running", param="request_id")
        if not 1 <= request.prompt_tokens <= len(tokens):
            raise InvalidRequest("the prompt is empty", param="prompt")
        if min(tokens) < 0 or max(tokens) >= self._vocab:
            strange = next(token for token in tokens if not 0 <= token < self._vocab)
            raise InvalidRequest(f"token {strange} is not in the vocabulary of {self._vocab}", param="prompt")
        validate(request.sampling, self._vocab)

    def _begin_stop(self, now_s: float) -> None:
        if self._stop_at_s is None:
            self._stop_at_s = now_s + STOP_TIMEOUT_S
            self._scheduler.abort_all(Draining("the worker stops; retry elsewhere"), now_s)

    # ---- the end --------------------------------------------------------------------------------------------------
    def _close(self, error: BatonError) -> None:
        """No submission is lost: what the inbox still holds is answered here, what comes later by `submit`."""
        with self._door:
            self._closed = error
        while True:
            try:
                self._inbox.get_nowait()(self._clock.now())
                self._delivery.deliver()
            except Empty:
                break
        for request in list(self._delivery.live.values()):
            self._delivery.abandon(request, error)

    def _crash(self, cause: BaseException) -> None:
        """Every request gets a typed end, then the owner of the process hears of it."""
        dump = crash_dump(cause, self._last_plan, self._delivery.live.values(), self._scheduler)
        _log.critical("the engine failed: %s: %s", type(cause).__name__, cause, exc_info=cause)
        error = BatonError(f"the worker failed ({type(cause).__name__}); retry elsewhere", kind=ErrorKind.INTERNAL)
        with self._door:
            self._closed = error
        if self._in_flight is not None:  # nothing may write into the pool while the role gives its pages back
            with contextlib.suppress(Exception):
                self._in_flight.collect(STOP_TIMEOUT_S)
        with contextlib.suppress(Empty):
            while True:
                event = self._inbox.get_nowait()
                if isinstance(event, partial) and event.func == self._admit:
                    request = event.args[0]
                    self._delivery.live.setdefault(request.request_id, request)
        for request in list(self._delivery.live.values()):
            self._delivery.abandon(request, error)
        self._on_crash(cause, dump)


def _walk_out(request: Request, now_s: float) -> None:
    """The phases of a request that the scheduler never saw."""
    for phase in (Phase.ABORTING, Phase.FENCING, Phase.FREED):
        request.advance(phase, now_s)
