"""Who may open a link to us: checks a hello, and remembers which incarnation of each worker is the newest.

A worker that comes back under its name replaces its former incarnation, whose link is cut; that one never gets in
again. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from baton_common.errors import ErrorKind
from baton_kvtransfer.errors import KVTransferError, LayoutMismatch, NoSlots, StalePeer
from baton_kvtransfer.protocol import PROTOCOL_VERSION
from baton_proto.common_pb2 import Compat
from baton_proto.compat import mismatch
from baton_proto.peer_pb2 import PeerHello

_REMEMBERED = 4096
RETRY_AFTER_MS = 1000

Cut = Callable[[], None]
"""Ends a link soon; from any thread."""


class Admission:
    def __init__(self, *, incarnation: str, compat: Compat, max_peers: int) -> None:
        self._incarnation = incarnation
        self._compat = compat
        self._max_peers = max_peers
        self._lock = threading.Lock()
        self._live: dict[str, tuple[str, Cut]] = {}  # worker -> (incarnation, cut)
        self._retired: OrderedDict[str, None] = OrderedDict()  # incarnations that were replaced

    def admit(self, hello: PeerHello, cut: Cut) -> None:
        """Raises what is wrong with the hello; else the link counts until `leave`, and the worker's older one ends."""
        if hello.protocol_version != PROTOCOL_VERSION:
            raise LayoutMismatch("protocol_version", PROTOCOL_VERSION, hello.protocol_version)
        if hello.target_incarnation != self._incarnation:
            text = (
                f"asked for incarnation {hello.target_incarnation!r}, this is {self._incarnation!r}; get a new ticket"
            )
            raise StalePeer(text, phase="hello")
        if not hello.worker_id or not hello.incarnation:
            raise KVTransferError("a hello needs worker_id and incarnation", phase="hello", kind=ErrorKind.INVALID)
        if field := mismatch(self._compat, hello.compat):
            raise LayoutMismatch(field, getattr(self._compat, field), getattr(hello.compat, field))
        with self._lock:
            former = self._live.get(hello.worker_id)
            if hello.incarnation in self._retired:
                raise StalePeer(f"incarnation {hello.incarnation!r} of {hello.worker_id} was replaced", phase="hello")
            if former is None and len(self._live) >= self._max_peers:
                text = f"{len(self._live)} senders are connected, as many as max_peers allows; raise max_peers"
                raise NoSlots(text, phase="hello", retry_after_ms=RETRY_AFTER_MS)
            self._live[hello.worker_id] = (hello.incarnation, cut)
            if former is not None and former[0] != hello.incarnation:
                self._retired[former[0]] = None
                if len(self._retired) > _REMEMBERED:
                    self._retired.popitem(last=False)
        if former is not None:
            former[1]()

    def leave(self, worker_id: str, cut: Cut) -> None:
        """The link is over. Its worker's name stays free for the next."""
        with self._lock:
            live = self._live.get(worker_id)
            if live is not None and live[1] == cut:
                del self._live[worker_id]
