"""A place with files, as the fetch sees it. Each kind of place is one class; which one is chosen here and nowhere else.

Calls block, are made from several threads, and never retry: that is the caller's, who knows how long it has been. Every
failure is one of `Unavailable` (try again), `Changed` (list again), `Mistake` or `FetchFailed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from baton_fetch.digests import Digest
from baton_fetch.request import BucketPlace, HubPlace, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """`pin` changes when the content does: an ETag, or the digest in the hub's tree."""

    name: str
    size_bytes: int
    pin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """`version` can be given to `list_files` to see the same files again; "" where a place has no versions."""

    version: str
    files: Mapping[str, RemoteFile]


class Source(Protocol):
    def list_files(self, version: str) -> Snapshot:
        """Files right at the place, none of its folders. `version` "" = what the request asks for."""
        ...

    def digest_of(self, file: RemoteFile) -> Digest:
        """What the content must hash to, as far as the place says."""
        ...

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of the pinned content."""
        ...


def open_source(request: Request, environment: Mapping[str, str], *, streams: int) -> Source:
    """Client libraries are large and loaded only when needed: a folder that is complete is seen in milliseconds."""
    place = request.place()
    if isinstance(place, HubPlace):
        from baton_fetch.hub import Hub

        return Hub(place, uri=request.uri, endpoint=request.endpoint)
    if isinstance(place, BucketPlace):
        from baton_fetch.bucket import Bucket

        return Bucket(place, uri=request.uri, endpoint=request.endpoint, environment=environment, streams=streams)
    from baton_fetch.demo import Demo

    return Demo()
