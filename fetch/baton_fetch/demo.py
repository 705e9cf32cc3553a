"""The demo model that comes with Baton, as a place."""

from __future__ import annotations

import hashlib

from baton_common.checkpoint import demo_checkpoint
from baton_fetch.digests import Digest
from baton_fetch.source import RemoteFile, Snapshot


class Demo:
    """Small enough to be hashed whenever it is listed."""

    def __init__(self) -> None:
        self._folder = demo_checkpoint()

    def list_files(self, version: str) -> Snapshot:
        files = [path for path in sorted(self._folder.iterdir()) if path.is_file()]
        return Snapshot(
            version="",
            files={
                path.name: RemoteFile(
                    name=path.name, size_bytes=path.stat().st_size, pin=hashlib.sha256(path.read_bytes()).hexdigest()
                )
                for path in files
            },
        )

    def digest_of(self, file: RemoteFile) -> Digest:
        return Digest(algorithm="sha256", value=file.pin)

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        with (self._folder / file.name).open("rb") as content:
            content.seek(begin)
            return content.read(end - begin)
