"""`baton-router`: settings, checkpoint, one HTTP server in this process. Exit codes: 0 stopped, 2 refused to start."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
import uvloop

from baton_common.errors import ConfigError
from baton_common.kube.credentials import find_credentials
from baton_common.logs import set_up
from baton_common.settings import from_command_line
from baton_router.api.app import create_app
from baton_router.checkpoint import load_checkpoint
from baton_router.config import RouterConfig, check_workers, split_address
from baton_router.service import Router

log = logging.getLogger("baton.router")

BACKLOG = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Blocks until SIGINT or SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        resolved, explain = from_command_line(
            RouterConfig, section="router", program="baton-router", argv=arguments, environment=os.environ
        )
        if explain:
            for name, value, source, text in resolved.explain():
                sys.stdout.write(f"{name:20} {value:30} {source:30} {text}\n")
            return 0
        config = resolved.value
        set_up(level=config.log_level, style=config.log_style)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        check_workers(config)
        credentials = find_credentials(config.kubeconfig, os.environ) if config.worker_services else None
        router = Router(config, load_checkpoint(config.model), credentials=credentials)
        listener = bind(config.listen)
    except ConfigError as error:
        sys.stderr.write(f"baton-router: {error}\n")
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(router, listener))
    return 0


def bind(listen: str) -> socket.socket:
    """Listening socket of host:port. Raises ConfigError when the port is taken or the host is not ours."""
    host, port = split_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # a second router on this port fails here, not at its first request
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is in use; stop the other process or choose another with --listen"
        else:
            text = f"cannot listen on {listen}: {error.strerror or error}"
        raise ConfigError(text, param="listen") from None
    return listener


class _Server(uvicorn.Server):
    """Goes on serving after the signal until the router's departure is over; then closes what is left."""

    def __init__(self, router: Router) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(router),
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=router.config.drain_s,
            )
        )
        self._router = router

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._router.departure.begin(linger=sig == signal.SIGTERM)  # whoever types Ctrl-C does not wait for balancers
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True ends the serving."""
        wants_to_exit = await super().on_tick(counter)
        departure = self._router.departure
        if not wants_to_exit or not (self.force_exit or departure.over(self._router.open_answers)):
            return False
        self.config.timeout_graceful_shutdown = math.ceil(departure.left_s)
        return True


async def serve(router: Router, listener: socket.socket) -> None:
    """Serve until a signal, then see clients off: see `departure.py`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)  # the server raises the signal again after its orderly end
    router.start()
    host, port = listener.getsockname()[:2]
    workers = ",".join(router.config.worker_services) or len(router.config.workers)
    log.info("serving %s on http://%s:%s", router.model, host, port, extra={"workers": workers})
    try:
        await _Server(router).serve(sockets=[listener])
    finally:
        await router.stop()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Orderly end has happened already."""


if __name__ == "__main__":
    sys.exit(main())
