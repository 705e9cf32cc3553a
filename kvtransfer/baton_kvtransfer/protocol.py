"""The vocabulary that both halves of the protocol share: states, edges, timers, conversions. Pure.

`sending.Sender` and `receiving.Receiver` are the halves: one object per link, values in, values out, the clock passed
in. They own no thread, no socket and no bytes; `outlink` and `inlink` run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.plan import Block
from baton_kvtransfer.records import FirstToken, Receipt
from baton_proto.common_pb2 import TokenLogprobs
from baton_proto.peer_pb2 import Chunk
from baton_proto.peer_pb2 import FirstToken as FirstTokenMessage

PROTOCOL_VERSION = 1
ALIVE_MISSES = 3
RESEND_ROUNDS = 2
REMEMBERED_TRANSFERS = 4096
"""How many finished transfers a receiver can still answer for, when a message about them is repeated."""


class SendState(Enum):
    QUEUED = "queued"  # Reserve is out
    PREFILLING = "prefilling"  # granted; more will be announced
    SENDING = "sending"  # everything was announced, or a round is being sent again
    SENT = "sent"  # waits for Commit
    RELEASED = "released"
    ABORTING = "aborting"  # Abort is out
    DRAINED = "drained"


SEND_EDGES: Mapping[SendState, frozenset[SendState]] = {
    SendState.QUEUED: frozenset({SendState.PREFILLING, SendState.SENDING, SendState.ABORTING, SendState.DRAINED}),
    SendState.PREFILLING: frozenset({SendState.SENDING, SendState.ABORTING, SendState.DRAINED}),
    SendState.SENDING: frozenset({SendState.SENT, SendState.RELEASED, SendState.ABORTING, SendState.DRAINED}),
    SendState.SENT: frozenset({SendState.SENDING, SendState.RELEASED, SendState.ABORTING, SendState.DRAINED}),
    SendState.ABORTING: frozenset({SendState.DRAINED, SendState.RELEASED}),
    SendState.RELEASED: frozenset(),
    SendState.DRAINED: frozenset(),
}


class ReceiveState(Enum):
    NEW = "new"  # expected, no Reserve yet
    RESERVED = "reserved"
    RECEIVING = "receiving"
    VERIFIED = "verified"  # every chunk is in the pages
    COMMITTED = "committed"
    ABORTING = "aborting"  # Abort is out
    DRAINED = "drained"


RECEIVE_EDGES: Mapping[ReceiveState, frozenset[ReceiveState]] = {
    ReceiveState.NEW: frozenset({ReceiveState.RESERVED}),
    ReceiveState.RESERVED: frozenset(
        {ReceiveState.RECEIVING, ReceiveState.VERIFIED, ReceiveState.ABORTING, ReceiveState.DRAINED}
    ),
    ReceiveState.RECEIVING: frozenset({ReceiveState.VERIFIED, ReceiveState.ABORTING, ReceiveState.DRAINED}),
    ReceiveState.VERIFIED: frozenset({ReceiveState.COMMITTED, ReceiveState.ABORTING, ReceiveState.DRAINED}),
    ReceiveState.COMMITTED: frozenset(),
    ReceiveState.ABORTING: frozenset({ReceiveState.DRAINED}),
    ReceiveState.DRAINED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timers:
    """Periods in seconds."""

    alive_s: float  # heartbeat, and repetition of what was not answered
    lease_s: float  # a peer, or its memory of a transfer, lives that long without a sign
    answer_s: float

    @classmethod
    def of(cls, config: TransferConfig) -> Timers:
        period = config.alive_interval_s
        return cls(alive_s=period, lease_s=period * ALIVE_MISSES, answer_s=config.answer_timeout_s)

    @property
    def tick_s(self) -> float:
        """How often the halves want `tick` while they hold transfers."""
        return self.alive_s / 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiving:
    transfer_id: TransferId


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    transfer_id: TransferId
    first: FirstToken | None
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    transfer_id: TransferId
    error: BatonError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Its owner knows."""

    transfer_id: TransferId


Event = Receiving | Received | Failed | Cancelled


def block_of(chunk: Chunk) -> Block:
    return Block(
        layer_begin=chunk.layer_begin,
        layer_end=chunk.layer_end,
        head_begin=chunk.head_begin,
        head_end=chunk.head_end,
        token_begin=chunk.token_begin,
        token_end=chunk.token_end,
    )


def first_to_wire(first: FirstToken) -> FirstTokenMessage:
    message = FirstTokenMessage(token_id=first.token_id, position=first.position)
    if first.logprob is not None:
        ids, values = [token for token, _ in first.top], [value for _, value in first.top]
        message.logprobs.CopyFrom(TokenLogprobs(logprob=first.logprob, top_ids=ids, top_logprobs=values))
    return message


def first_from_wire(message: FirstTokenMessage) -> FirstToken:
    if not message.HasField("logprobs"):
        return FirstToken(token_id=message.token_id, position=message.position)
    top = tuple(zip(message.logprobs.top_ids, message.logprobs.top_logprobs, strict=False))
    return FirstToken(token_id=message.token_id, position=message.position, logprob=message.logprobs.logprob, top=top)
