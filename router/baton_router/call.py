"""One HTTP request inside the router: its prompts, its choices, and the one reader that waits for them.

Choices of one prompt leave together when the prompt is short; otherwise the first leaves alone, and the rest when its
first token shows that the prompt's pages exist, so that a long prompt is prefilled once and not n times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton_common.errors import BatonError
from baton_router.fleet import Fleet
from baton_router.flight import Flight
from baton_router.metrics import RouterMetrics
from baton_router.order import Order
from baton_router.output import ChoiceOutput

SHARED_PROMPT_TOKENS = 128
"""Below this, n prefills cost less than waiting for the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallInfo:
    """What a response shows of the request it answers."""

    call_id: str
    chat: bool  # else plain completions
    model: str
    created_s: int
    prompt_tokens: int
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: int
    session: str = ""  # under which its KV is kept; "" = not kept


class Call:
    """Flights and outputs of one request. Created idle; `start` sends the flights out."""

    def __init__(
        self, info: CallInfo, fleet: Fleet, metrics: RouterMetrics, deadline_s: float, closed: Callable[[Call], None]
    ) -> None:
        self.info = info
        self.outputs: list[ChoiceOutput] = []
        self.deadline_s = deadline_s
        self.client_left = False
        self._fleet = fleet
        self._metrics = metrics
        self._groups: list[list[Flight]] = []
        self._late: dict[int, list[Flight]] = {}  # index of a leading choice -> flights that wait for it
        self._changed = asyncio.Event()
        self._dirty: dict[int, ChoiceOutput] = {}
        self._closed = closed

    def add_prompt(self, orders: Sequence[Order], outputs: Sequence[ChoiceOutput]) -> None:
        """The choices of one prompt, in order of their index."""
        flights = []
        for order, output in zip(orders, outputs, strict=True):
            flight = Flight(order, self._fleet, output, self._metrics)
            output.halt = flight.abort
            flights.append(flight)
        if len(orders[0].prompt.ids) >= SHARED_PROMPT_TOKENS and len(flights) > 1:
            self._late[outputs[0].index] = flights[1:]
        self._groups.append(flights)
        self.outputs += outputs

    def start(self) -> None:
        waiting = {flight for flights in self._late.values() for flight in flights}
        for flights in self._groups:
            for flight in flights:
                if flight not in waiting:
                    flight.start()

    def wake(self, output: ChoiceOutput) -> None:
        """An output has something new. Called once per token, so it does little."""
        self._dirty[output.index] = output
        self._changed.set()
        if self._late and output.error is None:
            for flight in self._late.pop(output.index, ()):
                flight.start()

    async def changed(self) -> list[ChoiceOutput]:
        """Waits until some outputs have news and returns these. The flights' deadlines end the wait."""
        await self._changed.wait()
        self._changed.clear()
        news, self._dirty = list(self._dirty.values()), {}
        return news

    @property
    def ended(self) -> bool:
        return all(output.ended for output in self.outputs)

    @property
    def error(self) -> BatonError | None:
        """The first failure of any choice: the call fails with it."""
        return next((output.error for output in self.outputs if output.error is not None), None)

    @property
    def output_tokens(self) -> int:
        return sum(output.output_tokens for output in self.outputs)

    @property
    def cached_tokens(self) -> int:
        """Of the leading choice of every prompt: the others find the leader's pages."""
        at, total = 0, 0
        for flights in self._groups:
            total += self.outputs[at].cached_tokens
            at += len(flights)
        return total

    def leave(self) -> None:
        """The client is gone: every worker is told in this very turn of the event loop."""
        self.client_left = True
        self._abort_all("client disconnected")
        self._changed.set()

    def close(self) -> None:
        """The answer is over, one way or another. Idempotent."""
        self._abort_all("the answer ended")
        self._closed(self)

    def _abort_all(self, reason: str) -> None:
        for flights in self._groups:
            for flight in flights:
                flight.abort(reason)
