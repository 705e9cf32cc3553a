"""A tier as the rest of the room sees it: never raises, and never gives a frame other than the one that was put.

What a tier gives back is verified here; what does not match its key, length or digest is deleted, counted and missing.
A call that fails or takes too long turns that kind of call off, with one warning; after a while it is tried again.
Reads and writes are off by themselves: a full disk can still be read. Calls come from the tier's own thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from baton_common.clock import Clock
from baton_kvtransfer.tiers.frames import FrameFormat, TierKey
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.tier import Tier

log = logging.getLogger(__name__)

Call = Literal["read", "write"]
_T = TypeVar("_T")


class Guard:
    def __init__(
        self,
        tier: Tier,
        frames: FrameFormat,
        *,
        clock: Clock,
        metrics: TierMetrics,
        retry_s: float,
        slow_s: float,
    ) -> None:
        """`retry_s`: how long it is left alone. `slow_s`: a call that takes longer counts as failed."""
        self.name = tier.name
        self._tier = tier
        self._frames = frames
        self._clock = clock
        self._metrics = metrics
        self._retry_s = retry_s
        self._slow_s = slow_s
        self._open = False
        self._off_until_s: dict[Call, float | None] = {"read": None, "write": None}
        self._why: dict[Call, str] = {"read": "", "write": ""}
        self._began_s: float | None = None  # of the call that runs
        metrics.begin(tier.name, calls=("read", "write"), reasons=("queue", "refused"))

    # ---- any thread --------------------------------------------------------------------------------------------------
    @property
    def bytes(self) -> int:
        return self._tier.bytes

    @property
    def hangs(self) -> bool:
        """The call that runs takes too long already: what is asked now would wait behind it."""
        began_s = self._began_s
        return began_s is not None and self._clock.now() - began_s > self._slow_s

    @property
    def reason(self) -> str:
        """Why it is off, wholly or in part; empty = it is on."""
        if self.hangs:
            return f"a call takes longer than {self._slow_s:.1f} s"
        return "; ".join(f"{call}: {why}" for call, why in self._why.items() if why)

    # ---- the tier's thread -------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Ahead of the first use, which would do it, too."""
        self._call("read", lambda: None, None)
        self._metrics.stored.labels(self.name).set(self._tier.bytes)

    def has(self, keys: Sequence[TierKey]) -> int:
        """How many of the leading keys are worth a `get`."""
        return self._call("read", lambda: self._tier.has(keys), 0)

    def get(self, key: TierKey, out: memoryview) -> bool:
        """True: `out` is the frame that was put under the key. False: `out` holds anything."""
        found = self._call("read", lambda: self._tier.get(key, out), 0)
        good = found == len(out) and self._frames.intact(out, key)
        if found and not good:
            self._metrics.damaged.labels(self.name).inc()
            log.warning("a page came back damaged and is deleted", extra={"tier": self.name, "page": key.hex()})
            self._call("write", lambda: self._tier.delete(key), None)
        if good:
            self._metrics.hits.labels(self.name).inc()
            self._metrics.bytes.labels(self.name, "out").inc(self._frames.payload_bytes)
        return good

    def put(self, key: TierKey, frame: memoryview) -> None:
        kept = self._call("write", lambda: self._tier.put(key, frame), None)
        if kept:
            self._metrics.bytes.labels(self.name, "in").inc(self._frames.payload_bytes)
        elif kept is not None:
            self._metrics.skipped.labels(self.name, "refused").inc()
        self._metrics.stored.labels(self.name).set(self._tier.bytes)

    def close(self) -> None:
        try:
            self._tier.close()
        except Exception as error:
            log.warning("a tier did not close: %s", _reason(error), extra={"tier": self.name})

    def _call(self, call: Call, work: Callable[[], _T], otherwise: _T) -> _T:
        off_until_s = self._off_until_s[call]
        if off_until_s is not None and self._clock.now() < off_until_s:
            return otherwise
        began_s = self._began_s = self._clock.now()
        try:
            if not self._open:
                self._tier.open()
                self._open = True
                began_s = self._clock.now()
            result = work()
        except Exception as error:
            self._failed(_reason(error), (call,) if self._open else ("read", "write"))
            return otherwise
        finally:
            self._began_s = None
        took_s = self._clock.now() - began_s
        if took_s > self._slow_s:
            self._failed(f"a {call} took {took_s:.1f} s", (call,))
        elif off_until_s is not None:
            self._off_until_s[call] = None
            self._why[call] = ""
            self._metrics.off.labels(self.name, call).set(0)
            log.info("a tier works again", extra={"tier": self.name, "call": call})
        return result

    def _failed(self, reason: str, calls: Sequence[Call]) -> None:
        if any(self._off_until_s[call] is None for call in calls):
            text = "a tier is off: %s; serving goes on without it (%s), and it is tried again every %.0f s"
            log.warning(text, reason, ", ".join(calls), self._retry_s, extra={"tier": self.name})
        for call in calls:
            self._metrics.faults.labels(self.name, call).inc()
            self._metrics.off.labels(self.name, call).set(1)
            self._off_until_s[call] = self._clock.now() + self._retry_s
            self._why[call] = reason


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
