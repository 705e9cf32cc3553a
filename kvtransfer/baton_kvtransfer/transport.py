"""Where channels come from: listening, dialling, and the choice between the two sockets of an address.

An address is `tcp://host:port?unix=<name>&host=<host id>`. The unix socket is abstract: reachable from the same network
namespace, gone with its process, no file to clean up. A host id names the running kernel and that namespace, so equal
ids mean that the unix socket can be reached and descriptors can be passed. Which wires run over it: `wires/choice.py`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs, urlencode, urlsplit

from baton_kvtransfer.channel import Channel, SocketChannel
from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.errors import PeerGone, WireError
from baton_kvtransfer.protocol import ALIVE_MISSES
from baton_kvtransfer.wires import Wire
from baton_kvtransfer.wires.choice import choose, has_rdma, host_id

log = logging.getLogger(__name__)

_PENDING = 128
_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialed:
    channel: Channel
    wires: tuple[str, ...]  # usable over it, preferred first
    reason: str


class Listener(Protocol):
    @property
    def address(self) -> str: ...

    def filenos(self) -> Sequence[int]: ...

    def accept(self) -> list[Channel]:
        """All that wait; never blocks."""

    def close(self) -> None: ...


class Transport(Protocol):
    @property
    def wires(self) -> Mapping[str, Wire]:
        """That this side can do, by name."""

    def listen(self) -> Listener:
        """Raises WireError naming the address."""

    def dial(self, address: str) -> Dialed:
        """Blocks up to the connect timeout. Raises PeerGone, or WireError for an address that makes no sense."""

    def close(self) -> None:
        """All links are over: closes the wires. Idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    host: str
    port: int
    unix: str = ""
    host_id: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if host is None or port is None or parts.scheme != "tcp":
            raise WireError(f"{text!r} is no peer address; expected tcp://host:port?unix=...&host=...")
        more = parse_qs(parts.query)
        return cls(host=host, port=port, unix=more.get("unix", [""])[0], host_id=more.get("host", [""])[0])

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        more = {key: value for key, value in (("unix", self.unix), ("host", self.host_id)) if value}
        return f"tcp://{host}:{self.port}" + (f"?{urlencode(more)}" if more else "")


class SocketTransport:
    """The real one: a tcp socket, and a unix socket beside it unless the settings insist on tcp."""

    def __init__(self, config: TransferConfig, *, rdma: bool | None = None) -> None:
        """`rdma`: are there devices; None = look. Raises WireError for a wire that was asked for and cannot be had."""
        self._config = config
        self._host_id = "" if config.wire == "tcp" else host_id()
        choice = choose(config, rdma=has_rdma() if rdma is None else rdma)
        self.wires: Mapping[str, Wire] = choice.wires
        self._skipped = dict(choice.skipped)

    def listen(self) -> SocketListener:
        ready = {}
        for name, wire in self.wires.items():
            try:
                wire.start()
                ready[name] = wire
            except WireError as error:
                wire.close()
                if self._config.wire == name:
                    raise
                log.warning("the %s wire is left out: %s", name, error.message)
                self._skipped[name] = error.message
        self.wires = ready
        return SocketListener(self._config, self._host_id, self._channel)

    def _channel(self, sock: socket.socket) -> SocketChannel:
        stall_s = self._config.alive_interval_s * ALIVE_MISSES
        return SocketChannel(sock, max_payload_bytes=self._config.slot_bytes, stall_s=stall_s)

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()

    def dial(self, address: str) -> Dialed:
        target = Address.parse(address)
        shared = bool(self._host_id) and target.host_id == self._host_id and bool(target.unix)
        insists = self._config.wire if self._config.wire != "auto" else ""
        where = "same host" if shared else "another host, or the peer is set to tcp"
        if shared:
            try:
                channel = self._channel(self._connect_unix(target))
                return Dialed(channel=channel, wires=self._offered(shared=True), reason=self._why(where, shared=True))
            except PeerGone as error:
                if insists == "shm":
                    raise
                where = f"same host, but {error.message}"
        elif insists == "shm":
            raise WireError(f"wire is set to shm, but the peer at {target.host}:{target.port} is on another host")
        channel = self._channel(self._connect_tcp(target))
        return Dialed(channel=channel, wires=self._offered(shared=False), reason=self._why(where, shared=False))

    def _offered(self, *, shared: bool) -> tuple[str, ...]:
        return tuple(name for name, wire in self.wires.items() if shared or not wire.caps.same_host)

    def _why(self, where: str, *, shared: bool) -> str:
        if self._config.wire != "auto":
            return f"wire is set to {self._config.wire}"
        if shared or "nixl" not in self._skipped:
            return where
        return f"{where}; nixl is left out: {self._skipped['nixl']}"

    def _connect_unix(self, target: Address) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._config.connect_timeout_s)
            sock.connect("\0" + target.unix)
        except OSError as error:
            sock.close()
            raise PeerGone(f"cannot connect to its unix socket: {error}", phase="connect") from error
        return sock

    def _connect_tcp(self, target: Address) -> socket.socket:
        try:
            sock = socket.create_connection((target.host, target.port), timeout=self._config.connect_timeout_s)
        except OSError as error:
            where = f"{target.host}:{target.port}"
            raise PeerGone(f"cannot connect to {where}: {error}", peer=where, phase="connect") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


class SocketListener:
    def __init__(self, config: TransferConfig, own_host_id: str, channel: ChannelOf) -> None:
        self._channel = channel
        host, _, port = config.listen.rpartition(":")
        host = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            tcp = socket.create_server((host, int(port)), family=family, backlog=_PENDING)
        except (OSError, ValueError, OverflowError) as error:
            raise WireError(f"cannot listen on {config.listen!r} for peers: {error}") from error
        self._sockets = [tcp]
        unix = ""
        if own_host_id:
            unix = f"baton-kv-{secrets.token_hex(8)}"
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind("\0" + unix)
            local.listen(_PENDING)
            self._sockets.append(local)
        for sock in self._sockets:
            sock.setblocking(False)
        bound = tcp.getsockname()[1]
        self.address = str(Address(host=config.advertise or host, port=bound, unix=unix, host_id=own_host_id))

    def filenos(self) -> Sequence[int]:
        return [sock.fileno() for sock in self._sockets]

    def accept(self) -> list[Channel]:
        channels: list[Channel] = []
        for listening in self._sockets:
            while (sock := _accept(listening)) is not None:
                if sock.family == socket.AF_UNIX:
                    _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
                    if uid != os.getuid():  # an abstract socket has no file mode to keep others out
                        sock.close()
                        continue
                else:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                channels.append(self._channel(sock))
        return channels

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class ChannelOf(Protocol):
    def __call__(self, sock: socket.socket) -> Channel: ...


def _accept(listening: socket.socket) -> socket.socket | None:
    try:
        return listening.accept()[0]
    except OSError:  # nobody there, or gone again before we looked
        return None
