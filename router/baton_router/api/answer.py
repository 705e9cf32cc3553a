"""One call as an ASGI response: waits for news, writes once per step, notices the client leaving.

The status line waits for the first news, so that a failure before the first byte still gets a proper status code.
A second task only listens for the disconnect; it ends with the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton_common.errors import BatonError
from baton_router.api.errors import error_object, error_response, shape_of
from baton_router.call import Call
from baton_router.metrics import RouterMetrics
from baton_router.responses import Writer

log = logging.getLogger("baton.router.api")

WRITE_GRACE_S = 30.0
"""After the deadline, how long a client that does not read may hold its connection."""
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """Runs a call to its end. `counted` hears the status code once."""

    def __init__(
        self, call: Call, writer: Writer, metrics: RouterMetrics, arrival_s: float, counted: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._call = call
        self._writer = writer
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._counted = counted
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        loop = asyncio.get_running_loop()
        listener = loop.create_task(self._listen(receive))
        status = 499
        try:
            async with asyncio.timeout_at(call.deadline_s + WRITE_GRACE_S):
                call.start()
                status = await (self._stream(send) if call.info.stream else self._whole(send))
        except TimeoutError:
            log.warning("a client does not read; its answer was dropped", extra={"request": call.info.call_id})
        except Exception:
            log.exception("answer failed", extra={"request": call.info.call_id})
            status = await self._broken(BatonError("internal error of the router; its log has the details"), send)
        finally:
            listener.cancel()
            call.close()
            self._metrics.e2e.observe(loop.time() - self._arrival_s)
            self._counted(status)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._call.ended:
            self._metrics.disconnects.inc()
            self._call.leave()

    async def _whole(self, send: Send) -> int:
        call = self._call
        while not call.ended and not call.client_left and call.error is None:
            await call.changed()
        if call.client_left:
            return 499
        if call.error is not None:
            return await self._broken(call.error, send)
        await self._begin(send, [(b"content-type", b"application/json")])
        await send({"type": "http.response.body", "body": self._writer.whole()})
        return 200

    async def _stream(self, send: Send) -> int:
        call, writer = self._call, self._writer
        while True:
            news = await call.changed()
            if call.client_left:
                return 499
            chunk, some_ended = b"", False
            for output in news:
                chunk += writer.events(output)
                some_ended = some_ended or output.ended
            if some_ended:
                if call.error is not None:
                    return await self._broken(call.error, send, chunk)
                if call.ended:
                    break
            if chunk:
                if not self._begun:
                    await self._begin(send, _STREAM_HEADERS)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if not self._begun:
            await self._begin(send, _STREAM_HEADERS)
        await send({"type": "http.response.body", "body": chunk + writer.closing()})
        return 200

    async def _begin(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        info = self._call.info
        headers = [*headers, (b"x-request-id", info.call_id.encode())]
        if info.session:
            headers.append((b"x-baton-session", quote(info.session, safe="").encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _broken(self, error: BatonError, send: Send, chunk: bytes = b"") -> int:
        """Before the first byte: an error answer. After it: an error event, and the stream is over."""
        if self._begun:
            event = chunk + b"data: " + error_object(error) + b"\n\n"
            await send({"type": "http.response.body", "body": event})
            return shape_of(error).status
        response = error_response(error)
        self._begun = True
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body})
        return response.status_code
