"""What both ends of a handoff say to routers when it fails."""

from __future__ import annotations

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import RequestId


def as_transfer_error(error: BatonError, request_id: RequestId) -> BatonError:
    """That somebody asked the other side for the end is no wish of our router: to it the handoff failed, try again."""
    if error.kind is not ErrorKind.ABORTED:
        return error
    return BatonError(error.message, kind=ErrorKind.TRANSFER, request_id=request_id)
