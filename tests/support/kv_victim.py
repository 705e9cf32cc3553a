"""A KV peer that dies by its own hand (SIGKILL) the moment one of its transfers reaches a given state of the protocol.

`moment`: "entered" = inside the transition, before anything is said about it; "said" = once the link's thread has sent
what belongs to the state. So every state is really reached, whatever the machine does meanwhile.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch
from support.kv_peer import Peer

from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.incoming import Incoming
from baton_kvtransfer.inlink import InLink
from baton_kvtransfer.outgoing import Outgoing
from baton_kvtransfer.outlink import OutLink


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(record: Any, link: Any, state: str, moment: str) -> None:
    """`record`: class of transfers, `link`: class that says what they have to say."""
    advance, flush = record.advance, link._flush
    due = False

    def step(self: Any, to: Any) -> None:
        nonlocal due
        advance(self, to)
        due |= to.value == state
        if due and moment == "entered":
            die()

    def flushed(self: Any, *more: Any) -> Any:
        value = flush(self, *more)
        if due:
            die()
        return value

    record.advance, link._flush = step, flushed


def watch_begin(made: Any, name: str, link: Any, moment: str) -> None:
    """The first state, in which a transfer is made by `made.name`."""
    make, flush = getattr(made, name), link._flush
    due = False

    def begin(self: Any, *arguments: Any, **more: Any) -> None:
        nonlocal due
        make(self, *arguments, **more)
        due = True
        if moment == "entered":
            die()

    def flushed(self: Any, *more: Any) -> Any:
        value = flush(self, *more)
        if due:
            die()
        return value

    setattr(made, name, begin)
    link._flush = flushed


def serve(pipe: Connection, name: str, incarnation: str, wire: str, state: str, moment: str) -> None:
    torch.set_num_threads(1)
    half, _, state = state.partition(" ")
    if state == "new":
        watch_begin(Expectations, "add", InLink, "entered")
    elif state == "queued":
        watch_begin(Outgoing, "__init__", OutLink, moment)
    elif half == "sender":
        watch(Outgoing, OutLink, state, moment)
    else:
        watch(Incoming, InLink, state, moment)
    Peer(pipe, name, incarnation, wire).run()
