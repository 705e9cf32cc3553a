"""/healthz, /readyz and /metrics of the operator. Alive means that its workers and its event loop go round.

A replica that waits for the lead is ready too: it would take over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from baton_common.errors import ConfigError

_STALLED_S = 120.0  # twice the longest pass


@asynccontextmanager
async def serving(
    *,
    health_port: int,
    metrics_port: int,
    registry: CollectorRegistry,
    stalled_s: Callable[[], float],
    watching: asyncio.Event,
) -> AsyncIterator[None]:
    """Serves inside the block; port 0 = not at all. Raises ConfigError when a port is taken."""

    async def healthz(_: web.Request) -> web.Response:
        seconds = stalled_s()
        if seconds > _STALLED_S:
            return web.Response(status=503, text=f"no worker came round for {seconds:.0f} s\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if watching.is_set() else web.Response(status=503, text="not watching yet\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    health, scrape = web.Application(), web.Application()
    health.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz)])
    scrape.add_routes([web.get("/metrics", metrics)])
    runners: list[web.AppRunner] = []
    try:
        for app, port in ((health, health_port), (scrape, metrics_port)):
            if port:
                runner = web.AppRunner(app, access_log=None)
                await runner.setup()
                runners.append(runner)
                await web.TCPSite(runner, "0.0.0.0", port).start()
        yield
    except OSError as error:
        raise ConfigError(f"cannot listen on {health_port} and {metrics_port}: {error.strerror or error}") from None
    finally:
        for runner in runners:
            await runner.cleanup()
