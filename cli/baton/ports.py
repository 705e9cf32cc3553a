"""Which TCP ports of this machine can be listened on. A look, not a reservation."""

from __future__ import annotations

import socket
from contextlib import closing

from baton_common.errors import ConfigError


def can_listen(host: str, port: int) -> bool:
    """True when a server could listen on host:port now. Raises ConfigError when `host` is not ours."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}", param="host") from None
    family, kind, protocol, _, address = found[0]
    with closing(socket.socket(family, kind, protocol)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def free_ports(count: int, *, host: str, first: int) -> tuple[int, ...]:
    """The `count` lowest ports from `first` on that can be listened on.

    `first` should lie below the range from which outgoing connections take theirs (32768 and up on Linux), so that
    a worker finds its port free again when it is restarted.
    """
    found: list[int] = []
    for port in range(first, 65536):
        if len(found) == count:
            break
        if can_listen(host, port):
            found.append(port)
    if len(found) < count:
        raise ConfigError(f"only {len(found)} of {count} ports from {first} on are free on {host}")
    return tuple(found)
