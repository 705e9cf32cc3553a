"""How payload crosses from a sender's pool into a receiver's slots. One file per wire; the protocol above is the same.

A wire is two ends: `Landing` memory made by the receiver, one region per link, and a `Reach` into it held by the
sender. The sender gathers into `reach.window(slot)`, digests, then `push` makes the bytes visible in the slot before
the chunk's header arrives. Nothing else of the protocol depends on the wire.
Libraries of one-sided writes (`oneside`, with the engines `nixl` and `mooncake`) register the landing, announce it in
`region`, and write into it out of staging memory; the header follows on the channel once the write is visible there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton_kvtransfer.channel import Channel
from baton_proto.peer_pb2 import PeerMessage, PeerWelcome, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a wire can do, for the choice among wires and for the care the receiver must take."""

    same_host: bool  # needs a channel that carries descriptors
    remote_memory: bool  # the peer can write the slots at any time: verify what was copied, not what was there before
    detects_death: bool  # a dead peer is seen by the operating system, not only by silence
    header_first: bool = False  # a header may be here before its bytes can be seen: verify before the copy, too


class Landing(Protocol):
    """Receiver's end of one link: the slots of one peer. Never shared with, or inherited by, another peer."""

    @property
    def region(self) -> bytes: ...  # for the welcome

    @property
    def fds(self) -> Sequence[int]: ...  # travel beside the welcome

    def slot(self, index: int, size: int) -> memoryview:
        """The first `size` bytes of a slot."""

    def fence(self) -> None:
        """After this, nothing that the peer does reaches memory of ours that is or will be in use."""


class Reach(Protocol):
    """Sender's end of one link."""

    def window(self, slot: Slot, size: int) -> memoryview:
        """Where to gather a chunk for that slot. Valid until the push."""

    def push(self, channel: Channel, message: PeerMessage, window: memoryview) -> bool:
        """True: the chunk is sent, or queued on the channel, and the window may be reused with its slot's next credit.
        False: `settled` will say so. Raises PeerGone."""

    def settled(self, channel: Channel) -> Sequence[int]:
        """Slots whose chunk has been sent since the last call. Raises PeerGone, WireError for one that never will."""

    def fence(self) -> None:
        """Let go of the peer's memory. No window is used after this."""


class Wire(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def caps(self) -> Caps: ...

    def start(self) -> None:
        """Raises WireError when no link could ever use it. May take seconds; the first link does not have them."""

    def land(self, *, slots: int, slot_bytes: int) -> Landing:
        """Make the memory for one peer. Raises WireError when the system has none."""

    def reach(self, welcome: PeerWelcome, channel: Channel, wake: Callable[[], None]) -> Reach:
        """Sender: from what the receiver announced; `wake`: from any thread, `settled` has news.

        Raises WireError when it cannot be used.
        """

    def close(self) -> None:
        """All links are over: let go of threads and libraries. Idempotent."""
