"""The FastAPI application: routes, keys, error objects for everything the framework itself refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from baton_common.errors import BatonError, ErrorKind, InvalidRequest
from baton_common.telemetry import UNRECORDED
from baton_router.api.answer import Answer
from baton_router.api.errors import Unauthorized, error_response
from baton_router.api.goodbye import Goodbye
from baton_router.api.spans import end_span, request_span
from baton_router.call import Call
from baton_router.responses import Writer
from baton_router.schema import ChatRequest, CompletionRequest, describe
from baton_router.service import Asker, ModelNotFound, Router, model_card

log = logging.getLogger("baton.router.api")

MAX_BODY_BYTES = 32 << 20
STALE_LOOP_S = 2.0


def create_app(router: Router) -> FastAPI:
    """The HTTP surface of one router. The caller starts and stops the router."""
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(Exception, _defect)
    app.add_middleware(Goodbye, departure=router.departure)
    _generation_routes(app, router)
    _model_routes(app, router)
    _session_routes(app, router)
    _operation_routes(app, router)
    return app


def _generation_routes(app: FastAPI, router: Router) -> None:
    async def answer(request: Request, endpoint: str, accept: Callable[[bytes, Asker], Awaitable[Call]]) -> Response:
        arrival_s = asyncio.get_running_loop().time()
        span = UNRECORDED

        def counted(status: int, call: Call | None = None) -> None:
            router.metrics.requests.labels(endpoint, str(status)).inc()
            end_span(span, status, call)

        try:
            tenant = _tenant(router, request)
            span = request_span(router.tracing, endpoint, request, router.model)  # who has no key leaves no span
            call = await accept(await _body(request), Asker(tenant=tenant, span=span))
        except BatonError as error:
            response = error_response(error)
        except Exception:
            log.exception("%s failed", endpoint)
            response = error_response(BatonError("internal error of the router; its log has the details"))
        else:
            writer = Writer(call, router.vocabulary)
            return Answer(call, writer, router.metrics, arrival_s, lambda status: counted(status, call))
        counted(response.status_code)
        return response

    @app.post("/v1/chat/completions", openapi_extra=dict(describe(ChatRequest)))
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "chat", router.chat)

    @app.post("/v1/completions", openapi_extra=dict(describe(CompletionRequest)))
    async def completions(request: Request) -> Response:
        return await answer(request, "completions", router.completion)


def _model_routes(app: FastAPI, router: Router) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            _tenant(router, request)
        except BatonError as error:
            return error_response(error)
        return _json({"object": "list", "data": [model_card(router)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        try:
            _tenant(router, request)
            if name != router.model:
                raise ModelNotFound(f"the model {name!r} does not exist; this is {router.model!r}", param="model")
        except BatonError as error:
            return error_response(error)
        return _json(model_card(router))


def _session_routes(app: FastAPI, router: Router) -> None:
    @app.delete("/v1/sessions/{name:path}")
    async def end_session(request: Request, name: str) -> Response:
        """`workers`: how many were told. One that is not connected now forgets the session when its time is over."""
        try:
            workers = router.end_session(name, _tenant(router, request))
        except BatonError as error:
            response = error_response(error)
        else:
            response = _json({"id": name, "object": "session.deleted", "deleted": True, "workers": workers})
        router.metrics.requests.labels("sessions", str(response.status_code)).inc()
        return response


def _operation_routes(app: FastAPI, router: Router) -> None:
    @app.get("/health")
    async def health() -> Response:
        """This handler runs on the loop that streams: an answer in time is the proof that it advances."""
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        await asyncio.sleep(0)
        lag_s = loop.time() - asked_s
        healthy = lag_s < STALE_LOOP_S
        return _json({"status": "ok" if healthy else "slow", "loop_lag_ms": round(lag_s * 1000, 3)}, healthy)

    @app.get("/ready")
    async def ready() -> Response:
        state = router.fleet.readiness()
        leaving = router.departure.under_way
        reasons = ["the router is shutting down", *state.reasons] if leaving else list(state.reasons)
        is_ready = state.ready and not leaving
        report = {"ready": is_ready, "model": router.model, "reasons": reasons, "workers": router.fleet.report()}
        return _json(report, is_ready)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def _tenant(router: Router, request: Request) -> str:
    """Whose key it is, "" where none is needed. Raises Unauthorized."""
    if not router.keys.needed:
        return ""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # header bytes come decoded as latin-1; keys are UTF-8
    key = given.strip().encode("latin-1").decode("utf-8", "surrogateescape")
    tenant = router.keys.tenant(key) if scheme.lower() == "bearer" else None
    if tenant is None:
        raise Unauthorized("wrong or missing API key; send it as `Authorization: Bearer KEY`")
    return tenant


def _json(content: object, ok: bool = True) -> Response:
    return Response(orjson.dumps(content), 200 if ok else 503, media_type="application/json")


async def _framework_error(request: Request, error: Exception) -> Response:
    """404 of unknown paths, 405 of wrong methods."""
    assert isinstance(error, HTTPException)
    shown = BatonError(f"{error.detail}: {request.method} {request.url.path}", kind=ErrorKind.INVALID)
    response = error_response(shown)
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    return error_response(BatonError("internal error of the router; its log has the details"))
