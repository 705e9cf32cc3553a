"""What the API can answer instead of yes."""

from __future__ import annotations

from baton_common.errors import BatonError, ErrorKind


class KubeError(BatonError):
    """The API refused, or could not be reached (`status` 0). The message has the server's own words."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, kind=_kind(status), retry_after_ms=round(retry_after_s * 1000))
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def refused(self) -> bool:
        """The request itself is at fault: the same one again gets the same answer."""
        return self.status in (400, 403, 404, 405, 413, 415, 422)


class NotFound(KubeError):
    """No such object, or no such resource."""


class Conflict(KubeError):
    """Somebody was faster (resourceVersion), or the name is taken."""


class Gone(KubeError):
    """The resourceVersion is too old to go on from."""


class NotLeader(BatonError):
    """A write was about to happen in a replica that does not lead any more; the leader will do it."""


class NameTaken(BatonError):
    """An object that we need exists and belongs to somebody else."""

    kind = ErrorKind.INVALID


_TYPES: dict[int, type[KubeError]] = {404: NotFound, 409: Conflict, 410: Gone}


def error_for(status: int, message: str, reason: str, retry_after_s: float) -> KubeError:
    return _TYPES.get(status, KubeError)(message, status=status, reason=reason, retry_after_s=retry_after_s)


def _kind(status: int) -> ErrorKind:
    if status == 429:
        return ErrorKind.OVERLOADED
    return ErrorKind.INVALID if 400 <= status < 500 else ErrorKind.INTERNAL
