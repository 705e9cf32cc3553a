"""What is left of a failed engine for whoever has to find out why: plain values, ready for JSON. Never raises."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Mapping

from baton_engine.request import Request
from baton_engine.sched.scheduler import Scheduler
from baton_engine.step import StepPlan


def crash_dump(
    cause: BaseException, plan: StepPlan | None, requests: Iterable[Request], scheduler: Scheduler
) -> Mapping[str, object]:
    """The exception, the last plan, where each request was, the page counts and what the invariant check says.

    No prompt and no output: token counts only.
    """
    return {
        "error": f"{type(cause).__name__}: {cause}",
        "traceback": traceback.format_exception(cause),
        "plan": None if plan is None else _plan(plan),
        "requests": [_request(request) for request in requests],
        "pages": _pages(scheduler),
        "invariant": _invariant(scheduler),
    }


def _plan(plan: StepPlan) -> dict[str, object]:
    return {
        "number": plan.number,
        "form": plan.form.value,
        "tokens": plan.tokens,
        "work": [
            {"request_id": item.request_id, "row": item.row, "start": item.start, "count": item.count,
             "sample": item.sample, "new_pages": list(item.new_pages)}
            for item in plan.work
        ],
    }  # fmt: skip


def _request(request: Request) -> dict[str, object]:
    return {
        "request_id": request.request_id,
        "mode": request.mode.value,
        "phase": request.phase.value,
        "prompt_tokens": request.prompt_tokens,
        "tokens": len(request.tokens),
        "preemptions": request.preemptions,
        "stamps": {phase.value: at_s for phase, at_s in request.stamps.items()},
    }


def _pages(scheduler: Scheduler) -> object:
    try:
        return dataclasses.asdict(scheduler.load().pages)
    except Exception as error:
        return f"not available: {error}"


def _invariant(scheduler: Scheduler) -> str:
    try:
        scheduler.check()
    except Exception as error:
        return str(error)
    return "holds"
