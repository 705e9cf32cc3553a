"""The thread that owns an engine: does what links ask, and looks after writes under way.

Links hand over closures; what became of a write is told to its owner on this thread. Looking often is dear and looking
rarely is slow, so the pauses grow while nothing lands: a stopped peer costs a hundred looks a second, nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from baton_kvtransfer.errors import KVTransferError, WireError
from baton_kvtransfer.wires.oneside.engine import Engine, Target, Write
from baton_kvtransfer.wires.oneside.memory import SlotMemory

log = logging.getLogger(__name__)

T = TypeVar("T")
Done = Callable[[KVTransferError | None], None]

_SPINS = 20  # looks without a pause; a small write lands within them
_SHORT_LOOKS = 400
_LONG_LOOKS = 1500
_SHORT_S, _LONG_S, _LONGEST_S = 50e-6, 1e-3, 10e-3
_JOIN_S = 3.0


class Pump:
    def __init__(self, name: str, open_engine: Callable[[], Engine]) -> None:
        self._name = name
        self._open_engine = open_engine
        self._engine: Engine | None = None  # of the thread, as everything but the queue
        self._writes: list[tuple[Target, Write, Done]] = []
        self._leaving: dict[Target, SlotMemory] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- from any thread ----------------------------------------------------------------------------------------
    def ask(self, work: Callable[[Engine], T], limit_s: float) -> T:
        """Do it there and wait. Raises what it raises; WireError after `limit_s`, or when the pump is closed."""
        answer: Future[T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                if self._engine is None:
                    self._engine = self._open_engine()
                answer.set_result(work(self._engine))
            except Exception as error:
                answer.set_exception(error)

        if not self._post(command):
            raise WireError(f"{self._name}: this endpoint was closed")
        try:
            return answer.result(limit_s)
        except TimeoutError:
            answer.cancel()
            raise WireError(f"{self._name}: the library did not answer within {limit_s:.1f} s") from None

    def tell(self, work: Callable[[Engine], None]) -> None:
        """Do it there, some time; nothing happens without an engine or after `close`."""

        def command() -> None:
            if self._engine is not None:
                work(self._engine)

        self._post(command)

    def write(self, target: Target, offset: int, size: int, done: Done) -> None:
        """`done` is called on the pump's thread, once; never after `close`."""

        def command() -> None:
            try:
                write = target.write(offset, size)
            except Exception as error:
                done(_typed(error))
            else:
                self._writes.append((target, write, done))

        self._post(command)

    def leave(self, target: Target, staging: SlotMemory) -> None:
        """No more writes to it. It is closed, and the staging memory let go, when the last one is over."""

        def command() -> None:
            self._leaving[target] = staging

        self._post(command)

    def close(self) -> None:
        """Ends the thread and the engine; writes under way go on without us. Blocks a few seconds at most."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._commands.put(None)
            thread.join(_JOIN_S)
            if thread.is_alive():
                log.error("%s: the transfer library does not come back", self._name)

    def _post(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed:
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"baton-kv-{self._name}", daemon=True)
                self._thread.start()
            self._commands.put(command)
            return True

    # ---- the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        looks = 0  # in a row at which nothing had landed
        while self._obey(_pause_s(looks) if self._writes else None):
            looks = 0 if self._look() else looks + 1
            self._part()
        for staging in self._leaving.values():
            staging.pin()  # the library may still read it
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _obey(self, pause_s: float | None) -> bool:
        """Wait for a command, None = as long as it takes; then run all. False: close."""
        if pause_s == 0.0:
            time.sleep(0)  # lets another thread have the interpreter
        try:
            command = self._commands.get(timeout=pause_s)
            while command is not None:
                try:
                    command()
                except Exception:  # a defect of one link must not take the others with it
                    log.exception("%s: a command failed", self._name)
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _look(self) -> bool:
        """True when a write is over, or none is left."""
        under_way = []
        for entry in self._writes:
            _, write, done = entry
            try:
                if not write.landed():
                    under_way.append(entry)
                    continue
            except Exception as error:
                done(_typed(error))
            else:
                done(None)
        changed = len(under_way) < len(self._writes)
        self._writes = under_way
        return changed or not under_way

    def _part(self) -> None:
        if not self._leaving:
            return
        busy = {id(target) for target, _, _ in self._writes}
        for target in [target for target in self._leaving if id(target) not in busy]:
            del self._leaving[target]
            try:
                target.close()
            except Exception:
                log.exception("%s: a peer cannot be let go", self._name)


def _typed(error: Exception) -> KVTransferError:
    """A library may raise anything; links and the pump live on typed errors."""
    return error if isinstance(error, KVTransferError) else WireError(f"the transfer library failed: {error!r}")


def _pause_s(looks: int) -> float:
    if looks < _SPINS:
        return 0.0
    if looks < _SHORT_LOOKS:
        return _SHORT_S
    return _LONG_S if looks < _LONG_LOOKS else _LONGEST_S
