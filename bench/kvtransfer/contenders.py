"""Whatever can move the 64 MiB of a shape from one process to another: our wires here, others in `peers`.

Each has its two processes. One that spins while it has nothing to do says so, and is frozen while others are measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from bench.kvtransfer.node import Node
from bench.kvtransfer.remote import Remote
from bench.kvtransfer.shapes import Shape

GRANT_S = 0.002
"""For a reservation, which is made before prefill begins and is no part of what is measured."""


class Contender(ABC):
    spins = False

    def __init__(self, name: str, shape: Shape) -> None:
        self.name = name
        self.shape = shape

    @property
    @abstractmethod
    def remotes(self) -> Sequence[Remote]: ...

    @abstractmethod
    def once(self) -> float:
        """Move everything; seconds."""

    @abstractmethod
    def verify(self) -> bool:
        """All bytes are where they belong."""

    def cpu_s(self) -> float:
        return sum(remote.cpu_s() for remote in self.remotes)

    def freeze(self) -> None:
        for remote in self.remotes if self.spins else ():
            remote.freeze()

    def thaw(self) -> None:
        for remote in self.remotes:
            remote.thaw()

    def close(self) -> None:
        for remote in self.remotes:
            remote.close()


class OurWire(Contender):
    """`KvEndpoint` on both sides, over one wire."""

    def __init__(
        self,
        wire: str,
        shape: Shape,
        *,
        digest: bool,
        environment: Mapping[str, str] | None = None,
        label: str = "",
        node: Callable[..., Node] = Node,
    ) -> None:
        super().__init__(f"{label or wire}, {'xxh3' if digest else 'no digest'}", shape)
        self._far = Remote(node, "d", wire, shape, digest, 0, environment=environment)
        try:
            self._near = Remote(node, "p", wire, shape, digest, 5, environment=environment)
        except BaseException:
            self._far.close()
            raise
        self.remotes = (self._near, self._far)
        self._address = self._far.call("address")
        self._number = 0

    remotes: Sequence[Remote] = ()

    def reserve(self, pages: int) -> str:
        """A transfer that is granted and has nothing announced yet."""
        self._number += 1
        name = str(self._number)
        self._far.call("expect", name, pages)
        self._near.call("open", name, pages, self._address, "d-1")
        time.sleep(GRANT_S)
        return name

    def exposed_s(self, pause_s: float) -> float:
        """What a transfer adds after the last of its layers, each of which took `pause_s` to compute."""
        name = self.reserve(self.shape.pages)
        return float(self._near.call("send_by_layers", name, self.shape.pages, pause_s))

    def send(self, pages: int) -> tuple[float, float, float]:
        """Seconds when it began, when the receiver had it, when the sender had the receipt."""
        name = self.reserve(pages)
        begin_s, receipt_s = self._near.call("send", name, pages)
        _, received_s = self._far.call("wait", name)
        return begin_s, received_s, receipt_s

    def once(self) -> float:
        begin_s, _, receipt_s = self.send(self.shape.pages)
        return receipt_s - begin_s

    def verify(self) -> bool:
        return bool(self._near.call("content") == self._far.call("content"))
