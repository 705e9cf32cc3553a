"""What crosses the door of this room: plain records and the callbacks into the worker.

Positions are absolute in the sequence. A page table starts at position 0: the KV of position p lies in
`pages[p // page_tokens]`, token `p % page_tokens`; entries before `first_token` are never touched.
Times are seconds on the clock that the endpoint was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from baton_common.errors import BatonError
from baton_common.ids import PageHash, PageId, RequestId, TransferId

PeerState = Literal["connecting", "up", "refused", "gone"]
Direction = Literal["out", "in"]


class Fence(Protocol):
    """Something may still touch pages until `done()` is true. Never false again; polled, so cheap."""

    def done(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """What decode needs to go on at the next position."""

    token_id: int
    position: int  # output position, 0 = first output of the request
    logprob: float | None = None  # None = not asked for
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that every byte arrived and was verified. `bytes` and `chunks` count each block once; resends are apart."""

    transfer_id: TransferId
    peer: str  # worker id of the other side
    wire: str  # "shm", "tcp", "inproc"
    bytes: int
    chunks: int
    resends: int
    first_chunk_s: float  # first chunk gathered (sender) or arrived (receiver); equals last when nothing was sent
    last_chunk_s: float
    finish_s: float  # sender: finish() was called; receiver: the peer said that all was sent
    commit_s: float  # the transfer was over, on this side

    @property
    def exposed_s(self) -> float:
        """Time that the transfer added after the last step: finish to commit."""
        return self.commit_s - self.finish_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbound:
    """A transfer that this worker waits for: pages are leased, a ticket went out."""

    transfer_id: TransferId
    request_id: RequestId
    pages: Sequence[PageId]
    first_token: int
    end_token: int
    deadline_s: float
    heads: tuple[int, int] | None = None  # [begin, end) of the own pool; None = all


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound:
    """A transfer that this worker makes. `pages` must hold still until the fence of `abort`, or until `done`.

    `done` is called once, on a transfer thread, and must not block; not after Transfer.abort (one may overlap).
    """

    transfer_id: TransferId
    request_id: RequestId
    peer_address: str  # from the ticket
    peer_incarnation: str  # from the ticket; another one living there is refused
    pages: Sequence[PageId]
    first_token: int
    end_token: int
    deadline_s: float  # end of the lease: then it fails (answer_timeout_s later if only Commit is missing)
    done: Callable[[Receipt | BatonError], None]
    heads: tuple[int, int] | None = None  # [begin, end) of the own pool; None = all


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What this worker asks a peer for: KV that lies in the pages of one of the peer's reservations.

    It comes as the transfer `transfer_id`, which was expected before with the same positions; both are page borders.
    """

    transfer_id: TransferId
    ticket: TransferId  # names the reservation
    peer_address: str  # from the ticket
    peer_incarnation: str  # from the ticket
    first_token: int
    end_token: int
    page_hash: PageHash  # of the last page wanted: names the tokens of all positions before `end_token`


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOrder:
    """A peer asks for KV that this worker holds. Positions make sense; ticket and hash are the owner's to check."""

    transfer_id: TransferId  # that the peer expects
    ticket: TransferId
    first_token: int
    end_token: int
    page_hash: PageHash
    page_tokens: int  # of the peer; both positions are multiples of it
    peer: str  # worker id
    peer_address: str
    peer_incarnation: str
    refuse: Callable[[BatonError], None]  # tells the peer; from any thread, at once or later


class InboundEvents(Protocol):
    """Into the worker. Called on transfer threads; must not block, must not raise.

    Per transfer: on_receiving at most once, then exactly one of on_received and on_failed, unless cancel came first.
    """

    def on_pull(self, order: PullOrder) -> None:
        """Open an Outbound to the peer with that transfer id, or refuse. An order may come twice: it means the same."""

    def on_receiving(self, transfer_id: TransferId) -> None:
        """The first chunk arrived."""

    def on_received(self, transfer_id: TransferId, first: FirstToken | None, receipt: Receipt) -> None:
        """KV of [first_token, end_token) is verified and in the pages; nothing here touches them any more.

        `first` is None when the peer sampled nothing: KV that was pulled.
        """

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        """Nothing here touches the pages any more; what they hold in the reserved range is undefined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """One link, for status pages."""

    worker_id: str  # "" until the peer said hello
    incarnation: str
    direction: Direction  # "out": we send KV to it
    address: str
    state: PeerState
    wire: str  # "" until chosen
    reason: str  # why this wire; why refused; why gone
    bytes: int  # payload moved over this link
    transfers: int  # in flight now
