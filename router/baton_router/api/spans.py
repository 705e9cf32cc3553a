"""The span of one HTTP request: begun when its key was accepted, ended with its status. The root of what workers say.

Names are those of OpenTelemetry's conventions for HTTP and generative AI. Where the request went, its flights tell.
"""

from __future__ import annotations

from starlette.requests import Request

from baton_common.telemetry import Kind, Span, Tracing
from baton_router.call import Call

_OPERATIONS = {"chat": "chat", "completions": "text_completion"}


def request_span(tracing: Tracing, endpoint: str, request: Request, model: str) -> Span:
    """Child of the client's span, when its `traceparent` says so."""
    operation = _OPERATIONS[endpoint]
    return tracing.span(
        f"{operation} {model}",
        parent=request.headers.get("traceparent", ""),
        kind=Kind.SERVER,
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "http.request.method": request.method,
            "http.route": request.url.path,
        },
    )


def end_span(span: Span, status: int, call: Call | None) -> None:
    """`call` None: the request was refused before it became one. Only what went wrong on our side is an error."""
    span.set({"http.response.status_code": status})
    if call is not None:
        span.set(
            {
                "gen_ai.response.id": call.info.call_id,
                "gen_ai.usage.input_tokens": call.info.prompt_tokens,
                "gen_ai.usage.output_tokens": call.output_tokens,
                "baton.cached_tokens": call.cached_tokens,
                "baton.choices": len(call.outputs),
                "baton.stream": call.info.stream,
            }
        )
    error = call.error if call is not None else None
    why = error.message if error is not None else f"status {status}"
    span.end(error=why if status >= 500 else "")
