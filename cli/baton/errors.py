"""Errors of the command line itself."""

from __future__ import annotations

from baton_common.errors import BatonError


class StartFailed(BatonError):
    """The service is not there; the message says why, `status` is for our own exit."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
