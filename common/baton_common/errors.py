"""Typed errors. Each says what went wrong and what to do, in one line, and whether a retry elsewhere makes sense."""

from __future__ import annotations

from enum import StrEnum


class ErrorKind(StrEnum):
    """Mirrors `baton.v1.ErrorKind` on the wire (lower case, without the prefix)."""

    INVALID = "invalid"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    ABORTED = "aborted"
    TRANSFER = "transfer"
    INCOMPATIBLE = "incompatible"
    DRAINING = "draining"
    INTERNAL = "internal"

    @property
    def retriable(self) -> bool:
        """True when the same request may succeed on another worker."""
        return self not in (ErrorKind.INVALID, ErrorKind.DEADLINE, ErrorKind.ABORTED)


class BatonError(Exception):
    """Base of every error that may leave a component. `str()` is one line for a user."""

    kind: ErrorKind = ErrorKind.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind | None = None,
        request_id: str = "",
        param: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or type(self).kind
        self.request_id = request_id
        self.param = param
        self.retry_after_ms = retry_after_ms


class InvalidRequest(BatonError):
    """The request can never work; `param` names the field."""

    kind = ErrorKind.INVALID


class Overloaded(BatonError):
    """No room now; `retry_after_ms` says when to come back."""

    kind = ErrorKind.OVERLOADED


class DeadlineExceeded(BatonError):
    """The request's own deadline passed; the message names the phase."""

    kind = ErrorKind.DEADLINE


class Aborted(BatonError):
    """Somebody asked for the end: the client went away, an operator cancelled."""

    kind = ErrorKind.ABORTED


class Draining(BatonError):
    """The worker takes no new work."""

    kind = ErrorKind.DRAINING


class Incompatible(BatonError):
    """Two sides disagree on a field of the compat record."""

    kind = ErrorKind.INCOMPATIBLE

    def __init__(self, field: str, ours: object, theirs: object, *, remedy: str = "") -> None:
        text = f"{field} differs: ours {ours!r}, theirs {theirs!r}"
        super().__init__(f"{text}; {remedy}" if remedy else text, param=field)
        self.field = field
        self.ours = str(ours)
        self.theirs = str(theirs)


class ConfigError(BatonError):
    """A setting, a file or a checkpoint is wrong; the process refuses to start with this one line."""

    kind = ErrorKind.INVALID
