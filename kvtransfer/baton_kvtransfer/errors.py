"""Typed failures of a handoff. Each names the transfer, the peer and the phase it died in.

A scheduler may map any of them to: recompute locally, retry on another pair, or fail the request. It may never use what
arrived: a transfer that ended with one of these has committed nothing.
"""

from __future__ import annotations

from typing import Self

from baton_common.errors import BatonError, ErrorKind
from baton_proto.common_pb2 import Error as WireErrorMessage
from baton_proto.common_pb2 import ErrorKind as WireErrorKind


class KVTransferError(BatonError):
    """Base of all. Empty strings mean: not known, or not about one transfer."""

    kind = ErrorKind.TRANSFER

    def __init__(
        self,
        message: str,
        *,
        transfer_id: str = "",
        peer: str = "",
        phase: str = "",
        kind: ErrorKind | None = None,
        param: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message, kind=kind, param=param, retry_after_ms=retry_after_ms)
        self.transfer_id = transfer_id
        self.peer = peer
        self.phase = phase

    def about(self, transfer_id: str, request_id: str, phase: str) -> Self:
        """The same failure, told of one transfer: links fail as a whole, requests one by one."""
        told = type(self).__new__(type(self), *self.args)
        told.__dict__.update(self.__dict__)
        told.transfer_id, told.request_id, told.phase = transfer_id, request_id, phase
        return told


class PeerGone(KVTransferError):
    """The connection broke or stayed silent: the peer is dead, stopped or cut off. Everything on the link fails."""


class StalePeer(KVTransferError):
    """Somebody else lives at that address now, or the caller is an incarnation that was already replaced."""


class LayoutMismatch(KVTransferError):
    """The two sides cannot exchange pages; `field` says why, with both values."""

    kind = ErrorKind.INCOMPATIBLE

    def __init__(
        self, field: str, ours: object, theirs: object, *, transfer_id: str = "", peer: str = "", phase: str = "hello"
    ) -> None:
        text = (
            f"{field} differs: ours {ours!r}, theirs {theirs!r}; run both workers with the same model and KV settings"
        )
        super().__init__(text, transfer_id=transfer_id, peer=peer, phase=phase, param=field)
        self.field = field
        self.ours = str(ours)
        self.theirs = str(theirs)


class NoSlots(KVTransferError):
    """The receiver serves as many peers as it has slots for."""

    kind = ErrorKind.OVERLOADED


class DeadlineExceeded(KVTransferError):
    """A wait ended without its answer; `phase` says which."""


class Aborted(KVTransferError):
    """One side asked for the end. `kind` is that of the reason, so a peer's own failure stays retriable."""

    kind = ErrorKind.ABORTED


class PullDenied(KVTransferError):
    """The peer will not send what we asked for: compute it."""


class Corrupt(KVTransferError):
    """Chunks were damaged or lost in every round of resending."""


class WireError(KVTransferError):
    """The peer broke the protocol, or the operating system refused a call."""


def to_wire(error: BatonError) -> WireErrorMessage:
    """As it crosses the link: kind, one line, the field at fault."""
    kind = WireErrorKind.Value(f"ERROR_KIND_{error.kind.name}")
    return WireErrorMessage(kind=kind, message=error.message, retry_after_ms=error.retry_after_ms, param=error.param)


def from_wire(error: WireErrorMessage, *, transfer_id: str, peer: str, phase: str) -> Aborted:
    """What the peer said, as our own error. An unknown or missing kind counts as a failed transfer."""
    name = WireErrorKind.Name(error.kind) if error.kind in WireErrorKind.values() else "ERROR_KIND_UNSPECIFIED"
    kind = ErrorKind.__members__.get(name.removeprefix("ERROR_KIND_"), ErrorKind.TRANSFER)
    return Aborted(
        f"peer {peer} aborted: {error.message}",
        transfer_id=transfer_id,
        peer=peer,
        phase=phase,
        kind=kind,
        param=error.param,
        retry_after_ms=error.retry_after_ms,
    )
