"""A TCP proxy on loopback between a client and a server: counts, slows, holds, and corrupts what the server sends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_CHUNK = 64 << 10


class TcpProxy:
    """`sent_bytes` counts what went to clients. Everything may be changed while it runs."""

    def __init__(self, port: int, *, bytes_per_s: float = float("inf")) -> None:
        self._port, self.bytes_per_s = port, bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0
        self.sent_bytes = 0
        self.hold_after_bytes: float = float("inf")
        """What would go beyond waits until this is raised."""
        self.corrupt: bytes = b""
        """The first occurrence in an answer loses a bit, `corruptions` times."""
        self.corruptions = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *raised: object) -> None:
        self.hold_after_bytes = float("inf")
        self._listener.shutdown(socket.SHUT_RDWR)   # a mere close would let the waiting accept take one more
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if answers:
                    data = self._touched(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _touched(self, data: bytes) -> bytes:
        while self.sent_bytes >= self.hold_after_bytes:
            time.sleep(0.01)
        with self._lock:
            self.sent_bytes += len(data)
            if self.corruptions and (at := data.find(self.corrupt)) >= 0:
                self.corruptions -= 1
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            now_s = time.monotonic()
            self._free_at_s = max(self._free_at_s, now_s) + len(data) / self.bytes_per_s
            pause_s = self._free_at_s - now_s
        time.sleep(pause_s)
        return data
