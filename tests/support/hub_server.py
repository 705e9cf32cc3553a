"""A model hub on loopback: the part of the Hugging Face hub's HTTP API that a download uses, and its storage.

Files of 1 kB and more are LFS: the hub answers with a redirect to the storage, which is another origin, takes signed
addresses only, and must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LFS_BYTES = 1000
_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)")
_RESOLVE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is part of the tests."""


class HubServer:
    """`models[name][revision]` is a commit, `trees[commit]` its files."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, str]] = {}
        self.trees: dict[str, dict[str, bytes]] = {}
        self.token = ""             # required when set
        self.expire_after = 1_000_000   # answers of the storage until its signed addresses are no longer good
        self.busy = 0               # answers with 503 that are still to come
        self.with_blobs = True      # mirrors leave details out
        self.ranges = True
        self.claimed_bytes: dict[str, int] = {}     # sizes that differ from the truth
        self.storage_bytes = 0      # sent
        self.storage_saw_token = False
        self.resolved: list[str] = []
        self._signature = 1
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), self._handler(part)) for part in ("hub", "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self.storage_port = self._servers[1].server_port
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *raised: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, files: Mapping[str, bytes], *, revision: str = "main", commit: str = "") -> str:
        commit = commit or commit_of(f"{name} {revision} {sorted(files)} {[len(f) for f in files.values()]}")
        self.trees[commit] = dict(files)
        self.models.setdefault(name, {})[revision] = commit
        return commit

    def _handler(self, part: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if part == "storage":
                    hub._storage(self)
                elif hub.busy:
                    hub.busy -= 1
                    reply(self, 503, {}, b"")
                elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    reply(self, 401, {"X-Error-Code": "RepoNotFound"}, b"")
                elif found := _API.match(self.path):
                    hub._info(self, found["name"], found["revision"])
                elif found := _RESOLVE.match(self.path):
                    hub._resolve(self, found["name"], found["revision"], found["file"])
                else:
                    reply(self, 404, {}, b"")

            do_HEAD = do_GET

        return Handler

    def _commit(self, handler: BaseHTTPRequestHandler, name: str, revision: str) -> str | None:
        revisions = self.models.get(name)
        if revisions is None:
            return reply(handler, 401, {"X-Error-Code": "RepoNotFound"}, b"")
        commit = revisions.get(revision) or (revision if revision in self.trees else None)
        return commit or reply(handler, 404, {"X-Error-Code": "RevisionNotFound"}, b"")

    def _info(self, handler: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        if (commit := self._commit(handler, name, revision)) is None:
            return
        siblings = []
        for file, data in self.trees[commit].items():
            entry: dict[str, Any] = {"rfilename": file}
            if self.with_blobs:
                size_bytes = self.claimed_bytes.get(file, len(data))
                entry |= {"size": size_bytes, "blobId": git_digest(data)}
                if len(data) >= _LFS_BYTES:
                    sha256 = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": size_bytes, "pointerSize": 130}
            siblings.append(entry)
        body = json.dumps({"id": name, "sha": commit, "private": False, "siblings": siblings}).encode()
        reply(handler, 200, {"Content-Type": "application/json"}, body)

    def _resolve(self, handler: BaseHTTPRequestHandler, name: str, revision: str, file: str) -> None:
        if (commit := self._commit(handler, name, revision)) is None:
            return
        data = self.trees[commit].get(file)
        if data is None:
            reply(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        self.resolved.append(file)
        headers = {"X-Repo-Commit": commit}
        if len(data) < _LFS_BYTES:
            ranged(handler, data, {**headers, "ETag": f'"{git_digest(data)}"'})
            return
        sha256 = hashlib.sha256(data).hexdigest()
        location = f"{self.storage_url}/{commit}/{file}?signature={self._signature}"
        headers |= {"Location": location, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        reply(handler, 302, headers, b"")

    def _storage(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, signature = handler.path.partition("?signature=")
        commit, _, file = path.strip("/").partition("/")
        with self._lock:
            self.storage_saw_token |= "Authorization" in handler.headers
            self.expire_after -= 1
            if self.expire_after == 0:
                self._signature += 1
            expired = signature != str(self._signature)
        if expired:
            reply(handler, 403, {}, b"expired")
            return
        sent = ranged(handler, self.trees[commit][file], {}, ranges=self.ranges)
        with self._lock:
            self.storage_bytes += sent


def git_digest(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def ranged(
    handler: BaseHTTPRequestHandler, data: bytes, headers: Mapping[str, str], *, ranges: bool = True
) -> int:
    """Answers with the range that was asked for; returns its length."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if wanted is None or not ranges:
        reply(handler, 200, headers, data)
        return len(data)
    begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
    part = data[begin:end]
    reply(handler, 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}, part)
    return len(part)


def reply(handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
