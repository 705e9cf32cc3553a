"""All workers together: who is up, which pair suits a prompt, whether the endpoint is ready and, if not, why.

Owner of the links and their tasks: links come and go with `assign`. One that left the assignment ends at once, or, if
its worker is connected, when the stream breaks: a terminating worker finishes its answers and gets no new ones.
Requests that found no worker register for the next change. Knows nothing of where assignments come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton_common.clock import Clock
from baton_common.ids import PageHash
from baton_common.telemetry import Attributes
from baton_proto import worker_pb2 as wire
from baton_proto.compat import mismatch
from baton_router.homes import Homes
from baton_router.links import Link, LinkState
from baton_router.order import Order
from baton_router.policy import Need, Refusal, WorkerRole, WorkerView, choose, choose_target
from baton_router.tokens import Prompt

_ROLES = {
    wire.ROLE_PREFILL: WorkerRole.PREFILL,
    wire.ROLE_DECODE: WorkerRole.DECODE,
    wire.ROLE_COLOCATED: WorkerRole.COLOCATED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Links of a chosen pair, with the prompt tokens each would have to compute."""

    decode: Link
    decode_key: str
    decode_tokens: int
    prefill: Link | None
    prefill_key: str
    prefill_tokens: int
    role: WorkerRole

    def told(self, how: str) -> Attributes:
        """For spans; `how` as in RouterMetrics.placed."""
        facts = {"baton.placement": how, "baton.decode_worker": self.decode_key}
        return {**facts, "baton.prefill_worker": self.prefill_key} if how in ("handoff", "move") else facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Answer of /ready."""

    ready: bool
    reasons: tuple[str, ...]


class Fleet:
    """The links, and what follows from them."""

    def __init__(self, addresses: Sequence[str], clock: Clock) -> None:
        """`addresses`: a first assignment without pods."""
        self.links: list[Link] = []
        self.absence = "no worker is configured; set --workers"
        """Why there is no link at all, for /ready."""
        self.trouble = ""
        """What keeps the assignment from following the truth, for /ready."""
        self.router_id = f"router-{uuid.uuid4().hex[:12]}"
        self.homes = Homes(clock)
        self._clock = clock
        self._started = False
        self._tasks: dict[Link, asyncio.Task[None]] = {}
        self._waiters: set[Callable[[], None]] = set()
        self._turn = 0
        self.assign(dict.fromkeys(addresses, ""))

    def start(self) -> None:
        self._started = True
        for link in self.links:
            self._run(link)

    async def stop(self) -> None:
        self._started = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    # ---- membership

    def assign(self, pods: Mapping[str, str]) -> None:
        """These are all workers from now on: address -> name of the pod that answers there ("" = anybody).

        An address that now belongs to another pod gets another link, beside the old one if that is connected still.
        """
        known = {(link.address, link.pod): link for link in self.links}
        for place, link in known.items():
            link.retired = place not in pods.items()
            if link.retired and link.hello is None:
                self._drop(link)
        for address, pod in pods.items():
            if (address, pod) not in known:
                link = Link(address, self.router_id, self._clock, self._changed, pod=pod)
                self.links.append(link)
                if self._started:
                    self._run(link)
        self._changed()

    def registered(self) -> list[Link]:
        """Links whose worker has introduced itself and whose stream holds."""
        return [link for link in self.links if link.hello is not None]

    def _run(self, link: Link) -> None:
        task = self._tasks[link] = asyncio.create_task(link.run(), name=f"link {link.address}")
        task.add_done_callback(lambda _: self._ended(link))

    def _ended(self, link: Link) -> None:
        del self._tasks[link]
        if self._started:
            self._drop(link)

    def _drop(self, link: Link) -> None:
        """Nothing of it remains. Idempotent."""
        if link in self.links:
            self.links.remove(link)
            self._changed()
        if link in self._tasks:
            self._tasks[link].cancel()

    # ---- choice

    def choose(self, order: Order, tokens: int, failed: set[str], busy: set[str]) -> Assignment | Refusal:
        """Pair for a prompt of `tokens` positions (outputs already made included). Advances the round-robin turn."""
        up = {link.key: link for link in self.links if link.up}
        views = {key: self._view(link, order) for key, link in up.items()}
        need = Need(
            tokens=tokens,
            local_below_tokens=order.local_below_tokens,
            failed=frozenset(failed),
            busy=frozenset(busy),
        )
        found = choose(views.values(), need, self._turn)
        if isinstance(found, Refusal):
            return found
        self._turn += 1
        self._went(order, up[found.decode])
        decode = views[found.decode]
        prefill = views[found.prefill] if found.prefill is not None else None
        return Assignment(
            decode=up[found.decode],
            decode_key=found.decode,
            decode_tokens=max(tokens - decode.matched_tokens, 1),
            prefill=up[found.prefill] if found.prefill is not None else None,
            prefill_key=found.prefill or "",
            prefill_tokens=max(tokens - max(prefill.matched_tokens, decode.matched_tokens), 1) if prefill else 0,
            role=decode.role,
        )

    def choose_target(self, order: Order, tokens: int, source: Link, avoid: set[str]) -> Assignment | None:
        """Another decode worker for a request of `tokens` positions that `source` decodes and will hand over."""
        up = {link.key: link for link in self.links if link.up or link is source}
        views = {key: self._view(link, order) for key, link in up.items()}
        need = Need(tokens=tokens, local_below_tokens=0, failed=frozenset(avoid))
        key = choose_target(views.values(), views[source.key], need, self._turn)
        if key is None:
            return None
        self._turn += 1
        self._went(order, up[key])
        return Assignment(
            decode=up[key],
            decode_key=key,
            decode_tokens=max(tokens - views[key].matched_tokens, 1),
            prefill=source,
            prefill_key=source.key,
            prefill_tokens=1,
            role=views[key].role,
        )

    def _view(self, link: Link, order: Order) -> WorkerView:
        hello, load = link.hello, link.load
        assert hello is not None
        hashes = _hashes(link, order.prompt)
        kept = self.homes.kept_pages(order.keep, link.key, hashes) if order.keep is not None else 0
        return WorkerView(
            key=link.key,
            role=_ROLES[hello.role],
            compat=link.compat,
            page_tokens=_page_tokens(link),
            matched_pages=max(link.pages.matched_pages(hashes), kept),
            queued_tokens=max(load.queued_tokens, link.queued_tokens),
            # the last report may be older than a burst of our own
            running=max(load.running + load.reserved, link.open_legs),
            free_pages=load.free_pages,
            total_pages=load.total_pages,
            step_ms=load.step_ms,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            draining=_leaving(link),
        )

    def _went(self, order: Order, decode: Link) -> None:
        if order.keep is not None:
            self.homes.went(order.keep, decode.key, _hashes(decode, order.prompt))

    def on_next_change(self, wake: Callable[[], None]) -> None:
        """Call `wake` once when a worker came, went, or changed its mind about draining."""
        self._waiters.add(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        self._waiters.discard(wake)

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for wake in waiters:
            wake()

    # ---- what clients and operators ask

    def context_tokens(self, default: int) -> int:
        """Shortest context any connected worker announced."""
        known = [link.hello.context_tokens for link in self.links if link.hello and link.hello.context_tokens]
        return min(known, default=default)

    def hash_roots(self) -> set[tuple[bytes, int]]:
        """(root, page size) of the connected workers, to hash prompts where they are tokenised."""
        return {
            (link.hello.hash_root, link.hello.compat.page_tokens)
            for link in self.links
            if link.hello and link.hello.hash_root and link.hello.compat.page_tokens
        }

    def readiness(self) -> Readiness:
        """Ready = colocated, or a decode and a prefill worker between which KV can move."""
        open_links = [link for link in self.links if link.up and not _leaving(link)]
        by_role: dict[WorkerRole, list[Link]] = {role: [] for role in WorkerRole}
        for link in open_links:
            assert link.hello is not None
            by_role[_ROLES[link.hello.role]].append(link)
        decodes, prefills = by_role[WorkerRole.DECODE], by_role[WorkerRole.PREFILL]
        paired = any(decode.compat == prefill.compat for decode in decodes for prefill in prefills)
        if paired or by_role[WorkerRole.COLOCATED]:
            return Readiness(ready=True, reasons=())
        reasons = [f"worker {_place(link)}: {_state(link)}" for link in self.links if link not in open_links]
        if not self.links:
            reasons.append(self.absence)
        if self.trouble:
            reasons.append(self.trouble)
        if not decodes:
            reasons.append("no decode worker is up")
        if not prefills:
            reasons.append("no prefill worker is up")
        for decode in decodes:
            reasons += [difference(prefill, decode) for prefill in prefills]
        return Readiness(ready=False, reasons=tuple(reasons))

    def report(self) -> list[dict[str, Any]]:
        """One row per worker, for /ready and `baton status`."""
        return [
            {
                "address": link.address,
                "pod": link.pod or None,
                "worker_id": link.hello.worker_id if link.hello else None,
                "role": _ROLES[link.hello.role].value if link.hello else None,
                "state": _state(link),
                "requests": link.open_legs,
                "running": link.load.running,
                "queued_tokens": link.load.queued_tokens,
                "free_pages": link.load.free_pages,
                "total_pages": link.load.total_pages,
                "known_pages": len(link.pages),
                "step_ms": round(link.load.step_ms, 3),
            }
            for link in self.links
        ]


def difference(prefill: Link, decode: Link) -> str:
    """First field of Compat on which two workers must agree and differ, with both values."""
    assert prefill.hello is not None
    assert decode.hello is not None
    ours, theirs = prefill.hello.compat, decode.hello.compat
    pair = f"prefill {prefill.hello.worker_id} and decode {decode.hello.worker_id}"
    field = mismatch(ours, theirs)
    if not field:
        return f"{pair} do not fit"
    return f"{pair} do not fit: {field} differs: {getattr(ours, field)!r} and {getattr(theirs, field)!r}"


def _place(link: Link) -> str:
    return f"{link.address} (pod {link.pod})" if link.pod else link.address


def _state(link: Link) -> str:
    if link.state is LinkState.UP:
        return "draining" if _leaving(link) else "up"
    return f"{link.state.value}: {link.reason}" if link.reason else link.state.value


def _leaving(link: Link) -> bool:
    return link.retired or link.load.draining


def _page_tokens(link: Link) -> int:
    assert link.hello is not None
    return link.hello.compat.page_tokens or 64


def _hashes(link: Link, prompt: Prompt) -> Sequence[PageHash]:
    """Of the prompt's full pages as this worker names them; none if it does not say how."""
    assert link.hello is not None
    return prompt.hashes(link.hello.hash_root, _page_tokens(link)) if link.hello.hash_root else ()
