"""Proof that KV pages cross from one prefill worker to one decode worker, by the handoff of a small prompt nobody has.

    RESERVE on decode -> ticket -> PREFILL on prefill -> token #1 -> (the pages arrive) -> token #2 from decode

Decode makes token #2 only from pages of which each arrived and fitted its digest, so the answer is the proof. It is an
ordinary request with its own cache salt: neither side can have its pages, and nobody else will ever match them.
Invariant: no leg is open when `probe` is over, however it ends. It does not know Kubernetes, gates, or when to ask.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from baton_common.errors import BatonError, ErrorKind
from baton_common.hashing import token_bytes
from baton_proto import worker_pb2 as wire
from baton_proto.common_pb2 import Compat
from baton_router.links import Leg, Link, Token
from baton_router.order import Order, submission
from baton_router.tokens import Prompt

log = logging.getLogger("baton.router.probe")

PAGES = 4
OUTPUTS = 2
"""Token #1 is prefill's, token #2 decode's."""
PRIORITY = 1000
"""Small, and pods wait for it: before the prompts in the queue."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
_FULL = frozenset({ErrorKind.OVERLOADED, ErrorKind.DRAINING})
_DEFECT = "internal error of the router; its log has the details"

Verdict = Literal["proved", "failed", "busy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """`busy`: a worker was full or draining, which says nothing about the transport; ask again later.

    `seconds` runs from prefill's token #1 to decode's token #2, both as they arrive here: the part of the handoff that
    a client would wait for. It holds the last layer group on the wire, digest, commit and one decode step; in the first
    probe of a pair also what of the connecting was not hidden behind the prompt; and the difference between the ways of
    the two messages. So it is an upper bound of the transfer's tail, and no bandwidth follows from it. `bytes` is the
    KV that crossed, computed from the narrower of the two dtypes. Both are 0 unless proved.
    """

    verdict: Verdict
    message: str
    seconds: float = 0.0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return self.verdict == "proved"


async def probe(prefill: Link, decode: Link, *, vocab_size: int, deadline_s: float = 10.0) -> ProbeResult:
    """Hand a few pages from `prefill` to `decode`. Takes at most `deadline_s`; raises nothing but cancellation."""
    try:
        obstacle = _obstacle(prefill) or _obstacle(decode)
        if obstacle is not None:
            return obstacle
        run = _Run(prefill, decode, vocab_size, deadline_s)
        try:
            run.start()
            return await run.over
        finally:
            run.close()
    except Exception:
        log.exception("the probe from %s to %s failed unexpectedly", prefill.key, decode.key)
        return ProbeResult(verdict="failed", message=_DEFECT)


class _Stage(Enum):
    RESERVING = "the reservation of decode worker"
    PREFILLING = "token #1 of prefill worker"
    HANDOVER = "the KV on decode worker"


class _Run:
    """The two legs of one probe. Event-driven: links call in, one timer; `over` gets the result once."""

    def __init__(self, prefill: Link, decode: Link, vocab_size: int, limit_s: float) -> None:
        assert prefill.hello is not None
        assert decode.hello is not None
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[ProbeResult] = self._loop.create_future()
        self._links = (prefill, decode)
        self._names = (prefill.hello.worker_id, decode.hello.worker_id)
        self._limit_s = limit_s
        self._order = _order(prefill.hello, decode.hello, vocab_size, self._loop.time() + limit_s)
        self._pages = self._order.prompt.hashes(decode.hello.hash_root, _page_tokens(decode.hello))
        self._token_bytes = min(_token_bytes(hello.compat) for hello in (prefill.hello, decode.hello))
        self._missing_tokens = 0
        self._stage = _Stage.RESERVING
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._first_at_s: float | None = None
        self._second_at_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_at(self._order.deadline_s, self._on_deadline)
        self._decode = self._links[1].submit(self._submission(wire.SUBMIT_MODE_RESERVE), self, 0)

    def close(self) -> None:
        """Nothing of the probe goes on. No abort is sent for a leg that ended by itself."""
        if self._timer is not None:
            self._timer.cancel()
        for leg in (self._decode, self._prefill):
            if leg is not None:
                leg.abort("the probe is over")

    def _submission(self, mode: wire.SubmitMode, ticket: wire.Ticket | None = None) -> wire.Submit:
        return submission(self._order, mode, outputs=(), now_s=self._loop.time(), ticket=ticket)

    # ---- from the links (LegEvents)

    def on_ticket(self, leg: Leg, ticket: wire.Ticket) -> None:
        prefill = self._links[0]
        if self.over.done():
            return
        if ticket.local:
            self._end("failed", f"decode worker {self._names[1]} takes no KV from others; start it with --role decode")
        elif not prefill.up:
            self._end("failed", f"prefill worker {self._names[0]} went away: {prefill.reason}")
        else:
            self._stage = _Stage.PREFILLING
            tokens = len(self._order.prompt.ids)
            self._missing_tokens = tokens - ticket.first_missing_token
            self._prefill = prefill.submit(self._submission(wire.SUBMIT_MODE_PREFILL, ticket), self, tokens)

    def on_token(self, leg: Leg, token: Token) -> None:
        now_s = self._loop.time()
        if leg is self._prefill and self._first_at_s is None:
            self._first_at_s = now_s
            self._stage = _Stage.HANDOVER
        elif leg is self._decode:  # may overtake prefill's message: they come on two streams
            self._second_at_s = now_s
        if self._first_at_s is not None and self._second_at_s is not None:
            for done in (self._prefill, self._decode):
                if done is not None:
                    done.release()
            self._prove(max(self._second_at_s - self._first_at_s, 0.0))

    def on_failed(self, leg: Leg, error: BatonError) -> None:
        role, name = ("prefill", self._names[0]) if leg is self._prefill else ("decode", self._names[1])
        if error.kind is ErrorKind.DEADLINE:  # it is our own deadline, as the worker saw it
            self._on_deadline()
        else:
            self._end("busy" if error.kind in _FULL else "failed", f"{role} worker {name}: {error.message}")

    def on_draining(self, leg: Leg) -> None:
        """What was begun may end."""

    def on_silent(self, leg: Leg) -> None:
        role, name = ("prefill", self._names[0]) if leg is self._prefill else ("decode", self._names[1])
        self._end("failed", f"{role} worker {name} gives no sign of life: {leg.link.reason}")

    def on_defect(self, leg: Leg) -> None:
        self._end("failed", _DEFECT)

    # ---- ends

    def _on_deadline(self) -> None:
        """Waiting behind others is no failure; pages that arrived are proof even if no row was free for token #2."""
        prefill, decode = self._links
        arrived = decode.up and decode.pages.matched_pages(self._pages) == len(self._pages) > 0
        if self._first_at_s is not None and arrived:
            waited_s = self._loop.time() - self._first_at_s
            self._prove(waited_s, "; decode had no free row for the next token")
            return
        link, name = (prefill, self._names[0]) if self._stage is _Stage.PREFILLING else (decode, self._names[1])
        waiting = self._stage is not _Stage.HANDOVER and _has_other_work(link)
        message = f"waited {self._limit_s:g} s for {self._stage.value} {name}: it never came"
        self._end("busy" if waiting else "failed", message)

    def _prove(self, seconds: float, remark: str = "") -> None:
        crossed = self._missing_tokens * self._token_bytes
        figures = f"{crossed / 1024:.1f} KiB in {self._missing_tokens} tokens, last of it after {seconds * 1000:.1f} ms"
        self._end("proved", f"KV crossed to decode worker {self._names[1]}: {figures}{remark}", seconds, crossed)

    def _end(self, verdict: Verdict, message: str, seconds: float = 0.0, crossed: int = 0) -> None:
        if not self.over.done():
            self.over.set_result(ProbeResult(verdict=verdict, message=message, seconds=seconds, bytes=crossed))


def _obstacle(link: Link) -> ProbeResult | None:
    """What makes it pointless to ask this worker now."""
    if link.hello is None or not link.up:
        return ProbeResult(verdict="failed", message=f"worker {link.key} is not connected: {link.reason}")
    if link.load.draining:
        return ProbeResult(verdict="busy", message=f"worker {link.key} is draining")
    if link.load.total_pages and link.load.free_pages <= PAGES + 1:
        return ProbeResult(verdict="busy", message=f"worker {link.key} has {link.load.free_pages} free KV pages")
    return None


def _has_other_work(link: Link) -> bool:
    load = link.load
    return link.open_legs > 1 or load.running + load.queued_requests + load.reserved > 1


def _order(prefill: wire.WorkerHello, decode: wire.WorkerHello, vocab_size: int, deadline_s: float) -> Order:
    """Some pages and one token, so that a part of a page crosses too; less where the context is that short."""
    nonce = uuid.uuid4().hex
    contexts = [hello.context_tokens for hello in (prefill, decode) if hello.context_tokens]
    tokens = min([PAGES * _page_tokens(decode) + 1, *(context - OUTPUTS for context in contexts)])
    ids = random.Random(nonce).choices(range(vocab_size), k=max(tokens, 1))
    return Order(
        request_id=f"probe-{nonce}",
        prompt=Prompt(ids=tuple(ids), raw=token_bytes(ids), text="", cache_salt=f"probe-{nonce}"),
        sampling=wire.Sampling(
            temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=OUTPUTS, ignore_eos=True
        ),
        deadline_s=deadline_s,
        worker_wait_s=0.0,
        resume_wait_s=0.0,
        local_below_tokens=0,
        priority=PRIORITY,
    )


def _page_tokens(hello: wire.WorkerHello) -> int:
    return hello.compat.page_tokens or 64


def _token_bytes(compat: Compat) -> int:
    """KV of one token over all layers, keys and values. 0 for a dtype unknown here: the proof does not need it."""
    width_bytes = _DTYPE_BYTES.get(compat.kv_dtype, 0)
    return 2 * compat.layers * compat.kv_heads * compat.head_dim * width_bytes
