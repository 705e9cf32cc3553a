"""The sender's handle of one transfer, between the threads of the worker and the thread of the link."""

from __future__ import annotations

import threading
from collections.abc import Callable

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_kvtransfer.backlog import Backlog
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.records import Fence, FirstToken, Outbound, Receipt
from baton_kvtransfer.sending import Sender

Command = Callable[[Sender], None]
Post = Callable[[Command], None]


class Transfer:
    """Thread-safe; every method only enqueues. Made by KvEndpoint.open."""

    def __init__(self, order: Outbound, post: Post, clock: Clock, layout: PageLayout) -> None:
        """`layout`: of the pool."""
        heads = layout.heads if order.heads is None else order.heads[1] - order.heads[0]
        self.order = order
        self.gate = Gate()
        self.backlog = Backlog(
            layers=layout.layers, heads=heads, first_token=order.first_token, end_token=order.end_token, clock=clock
        )
        self._post = post
        self._clock = clock
        self._lock = threading.Lock()
        self._over = False

    @property
    def unsent_tokens(self) -> int:
        """KV that was announced and has not left, in positions of all its layers and heads; 0 once it is over, or while
        the peer takes nothing."""
        return self.backlog.tokens

    def ready(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int) -> None:
        """KV of these layers and positions is in the pool. Per layer, positions come in order, without gaps.

        Positions outside [first_token, end_token), and those announced before, are ignored. A prefix hit is announced
        the same way, for all layers, right after `open`.
        """
        self.backlog.announce(layer_begin, layer_end, token_end)
        layers, tokens, now_s = (layer_begin, layer_end), (token_begin, token_end), self._clock.now()
        self._post(lambda sender: sender.ready(self.order.transfer_id, layers, tokens, now_s))

    def finish(self, first: FirstToken | None) -> None:
        """Everything was announced; `first`, if a token was sampled, travels with the last message. `done` follows."""
        now_s = self._clock.now()
        self._post(lambda sender: sender.finish(self.order.transfer_id, first, now_s))

    def abort(self, error: BatonError) -> Fence:
        """Give up; idempotent, also after the end. `done` is not called any more (one being delivered may overlap).

        The pages may be freed when the fence is done (at once, unless a gather is running).
        """
        with self._lock:
            first = not self._over
            self._over = True
        self.gate.close()
        self.backlog.drop()
        if first:
            now_s = self._clock.now()
            self._post(lambda sender: sender.abort(self.order.transfer_id, error, now_s))
        return self.gate

    def end(self, outcome: Receipt | BatonError) -> bool:
        """For the link's thread: the transfer is over. False when the owner had given up before."""
        with self._lock:
            if self._over:
                return False
            self._over = True
        self.gate.close()
        self.backlog.drop()
        self.order.done(outcome)
        return True
