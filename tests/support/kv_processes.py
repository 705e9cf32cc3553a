"""KV peers in processes of their own, and transfers between them and a world of this process."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable

from support.kv_peer import serve
from support.kv_world import LAYOUT, Run, World

TOKENS = 200
PAGES_USED = list(range(13))
ANSWER_S = 30.0

# children come out of a server that has torch loaded already, and no threads
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "baton_kvtransfer", "prometheus_client"])


class Process:
    def __init__(
        self, name: str, incarnation: str, wire: str, *more: object, target: Callable[..., None] = serve
    ) -> None:
        """`target(pipe, name, incarnation, wire, *more)` runs a Peer."""
        self.incarnation = incarnation
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=target, args=(theirs, name, incarnation, wire, *more), daemon=True)
        self._process.start()
        theirs.close()
        self.address = str(self.hear()["address"])

    def tell(self, **order: object) -> None:
        self._pipe.send_bytes(json.dumps(order).encode())

    def hear(self) -> dict[str, object]:
        assert self._pipe.poll(ANSWER_S), "the process says nothing"
        heard: dict[str, object] = json.loads(self._pipe.recv_bytes())
        return heard

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self) -> int | None:
        """Waits for its end; negative = ended by that signal."""
        self._process.join(ANSWER_S)
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)
        self._pipe.close()


def send_to(world: World, process: Process, *, everything: bool) -> Run:
    transfer_id = world.next_id()
    process.tell(do="expect", id=transfer_id, pages=PAGES_USED, tokens=TOKENS)
    assert process.hear() == {"expected": transfer_id}
    run = world.start(0, TOKENS, expect=False, address=process.address, incarnation=process.incarnation)
    run.handle.ready(0, LAYOUT.layers if everything else 2, 0, TOKENS)
    return run


def receive_from(world: World, process: Process, *, everything: bool) -> Run:
    """The process sends; the run's own sending half is pointed at nobody and fails at once."""
    run = world.start(0, TOKENS, address="tcp://127.0.0.1:9", incarnation="nobody")
    run.sent.wait()
    order_to_send(world, process, run, everything=everything)
    assert process.hear() == {"sending": run.transfer_id}
    return run


def order_to_send(world: World, process: Process, run: Run, *, everything: bool) -> None:
    process.tell(
        do="send", id=run.transfer_id, pages=PAGES_USED, tokens=TOKENS, all=everything,
        address=world.receiver.address, incarnation=world.receiver.incarnation,
    )  # fmt: skip
