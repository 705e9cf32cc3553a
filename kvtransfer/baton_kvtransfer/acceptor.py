"""The listening thread of an endpoint: takes connections, and ends expected transfers that no peer ever came for."""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable

from baton_common.clock import Clock
from baton_kvtransfer.channel import Channel
from baton_kvtransfer.transport import Listener
from baton_kvtransfer.waker import Waker

log = logging.getLogger(__name__)

IDLE_S = 60.0


class Acceptor:
    """`on_channel` gets every new connection; `on_time` ends what is overdue and says when it wants to be called again.

    Both run on this thread and must not block.
    """

    def __init__(
        self,
        *,
        listener: Listener,
        clock: Clock,
        on_channel: Callable[[Channel], None],
        on_time: Callable[[], float | None],
    ) -> None:
        self._listener = listener
        self._clock = clock
        self._on_channel = on_channel
        self._on_time = on_time
        self._waker = Waker()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="baton-kv-listen", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """The next deadline may be earlier than known."""
        self._waker.wake()

    def stop(self, timeout_s: float) -> None:
        self._stop = True
        self._waker.wake()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        poll = select.poll()
        for fileno in (*self._listener.filenos(), self._waker.fileno()):
            poll.register(fileno, select.POLLIN)
        while not self._stop:
            next_s = self._on_time()
            wait_s = IDLE_S if next_s is None else min(IDLE_S, max(0.0, next_s - self._clock.now()))
            poll.poll(wait_s * 1e3 + 1)
            self._waker.clear()
            for channel in self._listener.accept():
                try:
                    self._on_channel(channel)
                except RuntimeError:  # no more threads: one peer less, not one listener less
                    log.exception("cannot serve a new peer")
                    channel.close()
        self._listener.close()
        self._waker.close()
