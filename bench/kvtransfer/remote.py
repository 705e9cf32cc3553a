"""Objects that live in processes of their own and are called from the benchmark, one call at a time each.

Children come out of a server that has loaded torch already. They leave without exit handlers, as libraries that they
load crash there, and are killed when they do not leave.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "baton_kvtransfer", "prometheus_client"])

ANSWER_S = 60.0
"""Longest call; only bounds a run that is broken."""


class RemoteFailed(RuntimeError):
    """What the other process raised, or that it is gone."""


class Remote:
    """`make(*arguments)` runs there; `call` runs a method of what it made. `environment` is set before."""

    def __init__(self, make: Callable[..., Any], *arguments: object, environment: Mapping[str, str] | None = None):
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=_serve, args=(theirs, make, arguments, dict(environment or {})), daemon=True
        )
        self._process.start()
        theirs.close()
        self._frozen = False
        try:
            self.hear()
        except RemoteFailed:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "started"
        return self._process.pid

    def call(self, method: str, *arguments: object) -> Any:
        self.tell(method, *arguments)
        return self.hear()

    def tell(self, method: str, *arguments: object) -> None:
        """A call whose answer is heard later."""
        self._pipe.send((method, arguments))

    def hear(self) -> Any:
        try:
            if not self._pipe.poll(ANSWER_S):
                raise RemoteFailed(f"no answer within {ANSWER_S:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RemoteFailed("the process is gone") from None
        if not good:
            raise RemoteFailed(value)
        return value

    def cpu_s(self) -> float:
        """Processor seconds of that process so far."""
        return float(self.call("__cpu__"))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """Stop it until `thaw`: one that spins must not do so while others are measured."""
        if not self._frozen:
            self._frozen = True
            self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            self.signal(signal.SIGCONT)

    def close(self) -> None:
        """Let it close what it made; kill it when that takes long. Idempotent."""
        if self._pipe.closed:
            return
        self.thaw()
        try:
            self._pipe.send(None)
            self._process.join(5.0)
        except OSError:
            pass  # gone already
        self._process.kill()
        self._process.join(5.0)
        self._pipe.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries talk; what failed travels over the pipe
    torch.set_num_threads(1)
    made: Any = None
    try:
        made = make(*arguments)
        pipe.send((True, None))
        while (order := pipe.recv()) is not None:
            method, values = order
            try:
                value = time.process_time() if method == "__cpu__" else getattr(made, method)(*values)
            except Exception:
                pipe.send((False, traceback.format_exc(limit=4)))
            else:
                pipe.send((True, value))
        made.close()
    except (EOFError, ConnectionError):
        pass  # the benchmark ended
    except Exception:
        pipe.send((False, traceback.format_exc(limit=4)))
    os._exit(0)
