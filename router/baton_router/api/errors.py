"""Typed errors to OpenAI error objects and status codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson
from starlette.responses import Response

from baton_common.errors import BatonError, ErrorKind
from baton_router.flight import NoWorker
from baton_router.sampling import ContextExceeded
from baton_router.service import ModelNotFound


class Unauthorized(BatonError):
    """No key, or not one of ours."""

    kind = ErrorKind.INVALID


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How one kind of error looks over HTTP."""

    status: int
    type: str
    code: str | None


_BY_CLASS: tuple[tuple[type[BatonError], Shape], ...] = (
    (ModelNotFound, Shape(status=404, type="invalid_request_error", code="model_not_found")),
    (ContextExceeded, Shape(status=400, type="invalid_request_error", code="context_length_exceeded")),
    (Unauthorized, Shape(status=401, type="invalid_request_error", code="invalid_api_key")),
    (NoWorker, Shape(status=503, type="service_unavailable_error", code="no_worker")),
)

_BY_KIND = {
    ErrorKind.INVALID: Shape(status=400, type="invalid_request_error", code=None),
    ErrorKind.OVERLOADED: Shape(status=429, type="overloaded_error", code="overloaded"),
    ErrorKind.DEADLINE: Shape(status=504, type="timeout_error", code="deadline_exceeded"),
    ErrorKind.ABORTED: Shape(status=499, type="aborted_error", code="aborted"),
    ErrorKind.TRANSFER: Shape(status=502, type="server_error", code="transfer_failed"),
    ErrorKind.INCOMPATIBLE: Shape(status=503, type="service_unavailable_error", code="incompatible_workers"),
    ErrorKind.DRAINING: Shape(status=503, type="service_unavailable_error", code="draining"),
    ErrorKind.INTERNAL: Shape(status=500, type="server_error", code="internal_error"),
}


def shape_of(error: BatonError) -> Shape:
    """Status, type and code of an error."""
    return next((shape for kind, shape in _BY_CLASS if isinstance(error, kind)), _BY_KIND[error.kind])


def error_object(error: BatonError) -> bytes:
    """`{"error": {...}}`, as the body of an answer or the data of a stream event."""
    shape = shape_of(error)
    fields = {"message": error.message, "type": shape.type, "param": error.param or None, "code": shape.code}
    return orjson.dumps({"error": fields})


def error_response(error: BatonError) -> Response:
    """The whole HTTP answer."""
    headers = {}
    if error.retry_after_ms:
        headers["retry-after"] = str(math.ceil(error.retry_after_ms / 1000))
    if error.request_id:
        headers["x-request-id"] = error.request_id
    return Response(error_object(error), shape_of(error).status, headers, media_type="application/json")
