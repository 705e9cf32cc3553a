"""A small asynchronous client of the Kubernetes API: get, list, watch, server-side apply, patch, delete.

Every request has a deadline, a watch a bound on silence; every request is counted by verb and resource; every write
first asks `may_write`, so that a replica that lost the lead cannot write any more. Errors are typed (`errors.py`).
Retries belong to the caller, whose reconciliation starts over anyway. One object per process; use it on one event loop.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import aiohttp

from baton_common.clock import Clock
from baton_common.kube.credentials import Credentials, TokenSource
from baton_common.kube.errors import KubeError, NotFound, NotLeader, error_for
from baton_common.kube.kinds import Kind
from baton_common.kube.objects import Object, canonical, integer, mapping, objects, text

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_PAGE = 500
_READS = frozenset({"get", "list", "watch"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All objects at one moment, from which a watch can go on."""

    items: tuple[Object, ...]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`type`: ADDED, MODIFIED, DELETED, or BOOKMARK (whose object only has a resourceVersion)."""

    type: str
    item: Object


class CallCounter(Protocol):
    """Told of every answered or failed request: `code` is the HTTP status, 0 when none came."""

    def __call__(self, verb: str, resource: str, code: int, seconds: float) -> None: ...


def _uncounted(verb: str, resource: str, code: int, seconds: float) -> None:
    """Nobody wants to know."""


class KubeClient:
    """Use as `async with KubeClient(...) as client`."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        manager: str,
        clock: Clock,
        timeout_s: float = 10.0,
        connections: int = 16,
        may_write: Callable[[], bool] = lambda: True,
        count: CallCounter = _uncounted,
    ) -> None:
        self._credentials = credentials
        self._manager = manager
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._connections = connections
        self._may_write = may_write
        self._count = count
        self._tokens = TokenSource(credentials, clock)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        tls = self._credentials.ssl_context() if self._credentials.server.startswith("https:") else False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=self._connections), timeout=self._timeout, trust_env=False
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def exists(self, kind: Kind, namespace: str, name: str) -> bool:
        """Asks for metadata only: contents of a Secret never come here."""
        try:
            await self._call("get", "GET", kind, kind.path(namespace, name), accept=_METADATA_ONLY)
        except NotFound:
            return False
        return True

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """None when there is no such object, or the cluster does not serve the kind."""
        try:
            return await self._call("get", "GET", kind, kind.path(namespace, name))
        except NotFound:
            return None

    async def list(self, kind: Kind, namespace: str = "", *, selector: str = "") -> tuple[Object, ...]:
        """All objects, page by page. Items get the apiVersion and kind that lists leave out."""
        return (await self.listing(kind, namespace, selector=selector)).items

    async def listing(self, kind: Kind, namespace: str = "", *, selector: str = "") -> Listing:
        """The same, with the version of the whole."""
        found: list[Object] = []
        query = {"limit": str(_PAGE), **({"labelSelector": selector} if selector else {})}
        while True:
            page = await self._call("list", "GET", kind, kind.path(namespace), query=query)
            head = {"apiVersion": kind.api_version, "kind": kind.kind}
            found += [{**head, **item} for item in objects(page, "items")]
            more = text(page, "metadata", "continue")
            if not more:
                return Listing(items=tuple(found), version=text(page, "metadata", "resourceVersion"))
            query["continue"] = more

    @asynccontextmanager
    async def watch(
        self, kind: Kind, namespace: str = "", *, version: str, selector: str = "", limit_s: int, silence_s: float
    ) -> AsyncIterator[AsyncIterator[Change]]:
        """What changes after `version`. The iteration ends when the server ends it, after `limit_s` at the latest.

        Raises Gone when the version is too old, KubeError when the stream breaks or is silent for `silence_s`.
        """
        query = {
            "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": str(limit_s),
            **({"labelSelector": selector} if selector else {}),
        }  # fmt: skip
        timeout = aiohttp.ClientTimeout(total=None, connect=self._timeout.total, sock_read=silence_s)
        began_s, code, what = self._clock.now(), 0, f"watch {kind.resource}"
        try:
            async with self._open().get(
                self._credentials.server + kind.path(namespace), params=query, headers=self._headers(), timeout=timeout
            ) as response:
                code = response.status
                if code >= 400:
                    _answer(what, code, await response.read(), response.headers)
                yield _changes(what, response.content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unanswered(what, error) from error
        finally:
            self._count("watch", kind.resource, code, self._clock.now() - began_s)

    async def serves(self, kind: Kind) -> bool:
        """Does this cluster have the kind (its CRD)?"""
        try:
            found = await self._call("get", "GET", kind, f"/apis/{kind.group}/{kind.version}")
        except NotFound:
            return False
        return any(text(resource, "name") == kind.plural for resource in objects(found, "resources"))

    async def apply(
        self, kind: Kind, namespace: str, name: str, manifest: Object, *, subresource: str = "", manager: str = ""
    ) -> Object:
        """Server-side apply of exactly what we own; takes over fields that others changed. Creates what is absent."""
        query = {"fieldManager": manager or self._manager, "force": "true", "fieldValidation": "Strict"}
        path = kind.path(namespace, name, subresource)
        return await self._call("apply", "PATCH", kind, path, query=query, body=manifest, content=APPLY)

    async def merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, *, subresource: str = "", manager: str = ""
    ) -> Object:
        """JSON merge patch. A resourceVersion in it makes it conditional (Conflict)."""
        query = {"fieldManager": manager or self._manager}
        path = kind.path(namespace, name, subresource)
        return await self._call("patch", "PATCH", kind, path, query=query, body=patch, content=MERGE)

    async def strategic_merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, *, subresource: str = ""
    ) -> Object:
        """Patch that merges lists by their key (conditions by type). A uid in it makes it conditional (Conflict)."""
        query = {"fieldManager": self._manager}
        path = kind.path(namespace, name, subresource)
        return await self._call("patch", "PATCH", kind, path, query=query, body=patch, content=STRATEGIC)

    async def create(self, kind: Kind, namespace: str, manifest: Object) -> Object:
        """Conflict when the name is taken."""
        query = {"fieldManager": self._manager}
        return await self._call("create", "POST", kind, kind.path(namespace), query=query, body=manifest)

    async def replace(self, kind: Kind, namespace: str, name: str, manifest: Object) -> Object:
        """Conflict when its resourceVersion is not the newest."""
        query = {"fieldManager": self._manager}
        return await self._call("update", "PUT", kind, kind.path(namespace, name), query=query, body=manifest)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> bool:
        """Delete that very object, not a namesake made since. False when it was gone already."""
        body: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._call("delete", "DELETE", kind, kind.path(namespace, name), body=body)
        except NotFound:
            return False
        return True

    def _check_lead(self, verb: str, kind: Kind) -> None:
        if verb not in _READS and not self._may_write():
            raise NotLeader(f"{verb} {kind.resource} left to the replica that leads now")

    async def _call(
        self,
        verb: str,
        method: str,
        kind: Kind,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        self._check_lead(verb, kind)
        headers = self._headers(accept)
        if body is not None:
            headers["Content-Type"] = content
        began_s, code = self._clock.now(), 0
        try:
            async with self._open().request(
                method, self._credentials.server + path, params=query, headers=headers,
                data=None if body is None else canonical(body).encode(),
            ) as response:  # fmt: skip
                raw = await response.read()
                code = response.status
                return _answer(f"{verb} {kind.resource} {path}", code, raw, response.headers)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unanswered(f"{verb} {kind.resource}", error) from error
        finally:
            self._count(verb, kind.resource, code, self._clock.now() - began_s)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is not open; use it as `async with`")
        return self._session

    def _headers(self, accept: str = "application/json") -> dict[str, str]:
        headers = {"Accept": accept, "User-Agent": self._manager}
        if token := self._tokens.token():
            headers["Authorization"] = f"Bearer {token}"
        return headers


async def _changes(what: str, content: aiohttp.StreamReader) -> AsyncIterator[Change]:
    """One JSON object per line; lines may be longer than the reader's own limit."""
    rest = b""
    async for block in content.iter_any():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            try:
                event = mapping(json.loads(line))
            except ValueError:
                raise KubeError(f"{what}: the API server sent something else than JSON") from None
            item = mapping(event, "object")
            if text(event, "type") == "ERROR":
                raise error_for(
                    integer(item, "code"), f"{what}: {text(item, 'message')}", text(item, "reason"),
                    float(integer(item, "details", "retryAfterSeconds")),
                )  # fmt: skip
            yield Change(type=text(event, "type"), item=item)


def _unanswered(what: str, error: BaseException) -> KubeError:
    return KubeError(f"{what}: the API server does not answer ({str(error) or type(error).__name__})")


def _answer(what: str, code: int, raw: bytes, headers: Mapping[str, str]) -> Object:
    try:
        decoded = json.loads(raw) if raw else {}
    except ValueError:
        decoded = {}
    answer = mapping(decoded)
    if code < 400:
        return answer
    message = text(answer, "message") or raw[:200].decode(errors="replace")
    wait = headers.get("Retry-After", "")
    seconds = float(wait) if wait.isdigit() else float(integer(answer, "details", "retryAfterSeconds"))
    raise error_for(code, f"{what}: {message}", text(answer, "reason"), seconds)
