"""What was asked for: the URI taken apart, and checked. Knows no network and no file system."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from baton_fetch.errors import Mistake

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
DEMO = "baton://demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    name: str
    revision: str       # branch, tag or commit


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketPlace:
    bucket: str
    prefix: str         # "" or ends with a slash


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlace:
    """The model that comes with Baton."""


Place = HubPlace | BucketPlace | DemoPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of the program. Equal `identity` = the same files are wanted."""

    uri: str
    folder: Path
    revision: str = ""
    endpoint: str = ""
    only_tokenizer: bool = False

    @property
    def identity(self) -> dict[str, str]:
        return {"uri": self.uri, "revision": self.revision, "endpoint": self.endpoint}

    def place(self) -> Place:
        """Raises Mistake."""
        if self.endpoint:
            parts = urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise Mistake(f"endpoint {self.endpoint!r} is no http(s):// address; check spec.model.endpoint")
        scheme, separator, rest = self.uri.partition("://")
        if self.uri == DEMO:
            return self._without_revision(DemoPlace())
        if separator and scheme == "hf":
            return self._hub(rest)
        if separator and scheme == "s3":
            return self._without_revision(_bucket(self.uri, rest))
        raise Mistake(
            f"{self.uri}: not a place this program fetches from; use hf://owner/name, s3://bucket/prefix or {DEMO} "
            "(pvc:// and file:// are not fetched, they are mounted)"
        )

    def _hub(self, rest: str) -> HubPlace:
        name, _, inline = rest.strip("/").partition("@")
        if not _HUB_NAME.fullmatch(name):
            raise Mistake(f"{self.uri}: no name of a model on a hub; use hf://owner/name; check spec.model.uri")
        if inline and self.revision:
            raise Mistake(f"{self.uri}: names a revision, and --revision {self.revision} does too; remove one")
        return HubPlace(name=name, revision=self.revision or inline or "main")

    def _without_revision(self, place: Place) -> Place:
        if self.revision:
            raise Mistake(f"{self.uri}: has no revisions; remove spec.model.revision or use hf://owner/name")
        return place


def _bucket(uri: str, rest: str) -> BucketPlace:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise Mistake(f"{uri}: no name of a bucket; use s3://bucket/prefix; check spec.model.uri")
    prefix = prefix.strip("/")
    return BucketPlace(bucket=bucket, prefix=f"{prefix}/" if prefix else "")
