"""How long failures are borne: back-off between tries, and a time without success after which the cause is named.

A place that never answered is given up soon: in a pod the kubelet starts the fetch again, and its status says why
meanwhile. One that answered before is given minutes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from baton_common.clock import Clock
from baton_fetch.errors import FetchFailed, Unavailable
from baton_fetch.units import duration

log = logging.getLogger("baton.fetch")

T = TypeVar("T")
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 20.0


@dataclass(slots=True, kw_only=True)
class Patience:
    """`wait(seconds)` returns early, by an exception, when somebody asks for the end."""

    place: str
    clock: Clock
    wait: Callable[[float], None]
    contact_s: float = 5.0
    give_up_s: float = 300.0
    jitter: random.Random = field(default_factory=random.Random)
    _answered: bool = False
    _tries: int = 0
    _failing_since_s: float | None = None

    def succeeded(self) -> None:
        self._answered, self._tries, self._failing_since_s = True, 0, None

    def failed(self, cause: Unavailable) -> None:
        """Waits for the next try. Raises FetchFailed when it has taken too long."""
        now_s = self.clock.now()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        failing_s = now_s - self._failing_since_s
        limit_s = self.give_up_s if self._answered else self.contact_s
        self._tries += 1
        if failing_s >= limit_s:
            raise FetchFailed(
                f"{self.place}: gave up after {duration(failing_s)} without an answer ({cause}); check the network, "
                "the proxy and spec.model.endpoint; what is fetched is kept"
            ) from None
        wait_s = min(_FIRST_WAIT_S * 2 ** (self._tries - 1), _LONGEST_WAIT_S) * self.jitter.uniform(0.8, 1.2)
        wait_s = min(wait_s, limit_s - failing_s)
        log.warning("%s; try %d in %s", cause, self._tries + 1, duration(wait_s))
        self.wait(wait_s)

    def until_done(self, work: Callable[[], T]) -> T:
        """The result of `work`, tried again while it is unavailable."""
        while True:
            try:
                result = work()
            except Unavailable as error:
                self.failed(error)
            else:
                self.succeeded()
                return result
