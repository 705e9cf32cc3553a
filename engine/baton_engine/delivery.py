"""Outcomes of the scheduler become calls of the role, in order. Engine thread only.

Invariants: every request gets exactly one on_ended; every request whose pages the role knows gets release_kv, also when
the engine fails.
Does not know: steps, threads, why something happened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.ids import RequestId
from baton_engine.request import Mode, Phase, Request
from baton_engine.role import Role
from baton_engine.sched import records
from baton_engine.sched.scheduler import Scheduler
from baton_engine.step import StepPlan

_log = logging.getLogger(__name__)


class Delivery:
    def __init__(self, role: Role, scheduler: Scheduler, clock: Clock) -> None:
        self._role = role
        self._scheduler = scheduler
        self._clock = clock
        self._hooks = self._hook_table()
        self._announced: dict[RequestId, Request] = {}  # the role knows their pages: release_kv is due
        self.live: dict[RequestId, Request] = {}
        self.ended = 0  # read by any thread

    def deliver(self) -> None:
        while outcomes := self._scheduler.drain():
            for outcome in outcomes:
                self._hooks[type(outcome)](outcome)

    def refuse(self, request: Request, error: BatonError) -> None:
        """Of a request that the scheduler never saw."""
        self._role.on_ended(request, error)
        self.ended += 1

    def filled(self, request_id: RequestId) -> None:
        """The role answered on_fill: it has nothing to do with the pages any more."""
        request = self._announced.get(request_id)
        if request is not None and request.phase is Phase.FILLING:
            del self._announced[request_id]

    def sends(self, plan: StepPlan) -> bool:
        """Whether KV of this plan is announced by on_layers."""
        known = self._announced
        return bool(known) and any(
            item.request_id in known and known[item.request_id].mode is Mode.PREFILL for item in plan.work
        )

    def unsent_tokens(self) -> int:
        return self._role.unsent_tokens() if self._announced else 0

    def abandon(self, request: Request, error: BatonError) -> None:
        """The last word on a request whose pages nobody will ever free: this engine runs no more steps."""
        if self._announced.pop(request.request_id, None) is not None:
            with contextlib.suppress(Exception):
                self._role.release_kv(request, error)
        self.live.pop(request.request_id, None)
        with contextlib.suppress(Exception):
            self._role.on_ended(request, error)
        self.ended += 1

    # ---- hooks ----------------------------------------------------------------------------------------------------
    def _hook_table(self) -> Mapping[type[records.Outcome], Callable[..., None]]:
        role = self._role
        return {
            records.Tokens: lambda outcome: role.on_tokens(outcome.step, outcome.tokens),
            records.FillWanted: self._fill_wanted,
            records.PagesShared: lambda outcome: outcome.hold.answer(role.on_pages(outcome.hashes, outcome.pages)),
            records.Reserved: self._reserved,
            records.TurnedLocal: lambda outcome: role.on_local(outcome.request),
            records.PrefillAdmitted: self._prefill_admitted,
            records.PrefillDone: lambda outcome: role.on_prefill_done(outcome.request, outcome.first),
            records.KvRelease: self._release,
            records.Preempted: _log_preempted,
            records.KvEvents: lambda outcome: role.on_kv_events(outcome.stored, outcome.removed),
            records.Ended: self._end,
        }

    def _fill_wanted(self, outcome: records.FillWanted) -> None:
        self._announced[outcome.request.request_id] = outcome.request
        self._role.on_fill(outcome.request, outcome.pages, outcome.hashes, outcome.have_tokens)

    def _reserved(self, outcome: records.Reserved) -> None:
        self._announced[outcome.request.request_id] = outcome.request
        self._role.on_reserved(outcome.request, outcome.pages, outcome.first_missing_token)

    def _prefill_admitted(self, outcome: records.PrefillAdmitted) -> None:
        self._announced[outcome.request.request_id] = outcome.request
        self._role.on_prefill_admitted(outcome.request, outcome.pages, outcome.computed_tokens)

    def _release(self, outcome: records.KvRelease) -> None:
        request = outcome.request
        self._announced.pop(request.request_id, None)
        fence = self._role.release_kv(request, outcome.error)
        self._scheduler.kv_released(request.request_id, fence, self._clock.now())

    def _end(self, outcome: records.Ended) -> None:
        self.live.pop(outcome.request.request_id, None)
        self._role.on_ended(outcome.request, outcome.error)
        self.ended += 1


def _log_preempted(outcome: records.Preempted) -> None:
    request = outcome.request
    _log.info(
        "preempted", extra={
            "request_id": request.request_id, "times": request.preemptions, "lost_tokens": outcome.lost_tokens,
        },
    )  # fmt: skip
