"""How much KV of one transfer was announced and has not left yet; the engine reads it before every step.

Written by the threads that announce and by the link's thread, under a lock; read by any without it. It counts what was
announced while the link is still being made, too. A peer that takes nothing is not a slow network: after STALLED_S its
transfers count no more, so that one broken peer does not hold up the prefill for all others.
Invariant: 0 once the transfer is over, whatever was left.
"""

from __future__ import annotations

import threading

from baton_common.clock import Clock
from baton_kvtransfer.plan import Block

STALLED_S = 0.5


class Backlog:
    def __init__(self, *, layers: int, heads: int, first_token: int, end_token: int, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._marks = [first_token] * layers  # per layer: announced up to here
        self._end_token = end_token
        self._heads = heads
        self._cells = 0  # (layer, head, position)
        self._moved_s = 0.0  # when a chunk left, or the first one might have
        self._over = False

    @property
    def tokens(self) -> int:
        """Positions of all layers and heads, rounded up."""
        if self._cells <= 0 or self._clock.now() - self._moved_s > STALLED_S:
            return 0
        return -(-self._cells // (len(self._marks) * self._heads))

    def announce(self, layer_begin: int, layer_end: int, token_end: int) -> None:
        """Positions up to `token_end` are ready in these layers; what was announced before does not count twice."""
        end = min(token_end, self._end_token)
        with self._lock:
            if self._over:
                return
            if self._cells <= 0:
                self._moved_s = self._clock.now()
            for layer in range(layer_begin, min(layer_end, len(self._marks))):
                if self._marks[layer] < end:
                    self._cells += (end - self._marks[layer]) * self._heads
                    self._marks[layer] = end

    def left(self, block: Block) -> None:
        """A chunk is out. One that is sent again counts below zero, which nobody sees: everything had left by then."""
        with self._lock:
            if not self._over:
                self._cells -= block.layers * block.heads * block.tokens
                self._moved_s = self._clock.now()

    def drop(self) -> None:
        """The transfer is over."""
        with self._lock:
            self._over = True
            self._cells = 0
