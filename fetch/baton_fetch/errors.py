"""What ends a fetch, and what only delays it. `str()` is one line that fits a pod's termination message."""

from __future__ import annotations

from baton_common.errors import BatonError, ErrorKind


class FetchFailed(BatonError):
    """Ends the fetch; the folder stays resumable. Nothing the user wrote is known to be wrong."""

    kind = ErrorKind.TRANSFER
    exit_status = 1


class Mistake(FetchFailed):
    """The user's: not found, denied, no such thing. Trying again as it is changes nothing."""

    kind = ErrorKind.INVALID
    exit_status = 2


class Interrupted(FetchFailed):
    """Somebody asked for the end."""

    kind = ErrorKind.ABORTED


class Unavailable(Exception):
    """A try failed and another may succeed: no connection, a cut-off answer, a busy server."""


class Changed(Exception):
    """The object is no longer the one that was listed."""


class LockLost(Exception):
    """Another process took the folder over."""
