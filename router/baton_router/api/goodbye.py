"""While the router leaves, each answer tells its client to come back over another connection: it leads elsewhere.

Outside of all routes, so that it holds for refusals too. It does not know what is asked or answered.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton_router.departure import Departure

_CLIENT_PATHS = "/v1/"
"""What clients ask; probes and scrapes come for ever and would keep a leaving router from ending."""


class Goodbye:
    """ASGI middleware. Costs nothing per message while the router stays."""

    def __init__(self, app: ASGIApp, departure: Departure) -> None:
        self._app = app
        self._departure = departure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_CLIENT_PATHS):
            self._departure.asked()
        if not self._departure.under_way:
            await self._app(scope, receive, send)
            return

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, closing)
