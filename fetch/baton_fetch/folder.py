"""The target folder and what this program remembers about it, in `.baton-fetch/` inside it.

`manifest.json` names every file that is whole and verified, and says what is complete: nothing, all that a router
reads, or everything. A file gets its name by a rename when it is verified: nobody ever sees half of one. Half files lie
under `parts/`, each with a note of the content they belong to. Every write of the manifest is atomic.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from baton_fetch.errors import Mistake
from baton_fetch.request import Request

STATE = ".baton-fetch"
_MANIFEST = "manifest.json"


class Breadth(StrEnum):
    """What of a checkpoint is there."""

    NONE = ""
    TOKENIZER = "tokenizer"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A whole file. `digest` is hex, by `algorithm`; algorithm `size` = the place had no digest to compare with."""

    size_bytes: int
    pin: str
    algorithm: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    uri: str
    revision: str = ""
    endpoint: str = ""
    version: str = ""
    complete: Breadth = Breadth.NONE
    files: Mapping[str, Verified] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


class Folder:
    """Reads and writes below one path. Only the holder of the lock may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / STATE
        self._parts = self.state / "parts"

    @property
    def lock_path(self) -> Path:
        return self.state / "lock"

    def make(self) -> None:
        """Raises OSError."""
        self._parts.mkdir(parents=True, exist_ok=True)

    def manifest(self) -> Manifest | None:
        """None when there is none, or none that can be read."""
        try:
            document = json.loads((self.state / _MANIFEST).read_text())
            files = {name: Verified(**entry) for name, entry in document.pop("files").items()}
            return Manifest(**{**document, "complete": Breadth(document["complete"]), "files": files})
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return None

    def satisfies(self, request: Request) -> Manifest | None:
        """The manifest, when all that is asked for is there and every file has its size. Raises Mistake."""
        manifest = self.manifest()
        if manifest is None:
            return None
        self.require_same(manifest, request)
        enough = (Breadth.ALL, Breadth.TOKENIZER) if request.only_tokenizer else (Breadth.ALL,)
        if manifest.complete not in enough:
            return None
        return manifest if all(self.has(name, file) for name, file in manifest.files.items()) else None

    def require_same(self, manifest: Manifest, request: Request) -> None:
        """Raises Mistake when the folder is for something else."""
        held = {"uri": manifest.uri, "revision": manifest.revision, "endpoint": manifest.endpoint}
        if held != request.identity:
            what = " ".join(filter(None, (manifest.uri, manifest.revision, manifest.endpoint)))
            raise Mistake(f"{request.uri}: {self.path} holds {what}; give another folder, or empty this one")

    def has(self, name: str, file: Verified) -> bool:
        try:
            return (self.path / name).stat().st_size == file.size_bytes
        except OSError:
            return False

    def write_manifest(self, manifest: Manifest) -> None:
        half = self.state / f"{_MANIFEST}.new"
        with half.open("w") as file:
            json.dump(asdict(manifest), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.state / _MANIFEST)

    def part(self, name: str, pin: str) -> Path:
        """Where the half file lies. One that belongs to other content is removed."""
        part, note = self._parts / f"{name}.part", self._parts / f"{name}.pin"
        if not note.exists() or note.read_text() != pin:
            part.unlink(missing_ok=True)
            note.write_text(pin)
        return part

    def part_bytes(self, name: str, pin: str) -> int:
        return size if (size := _size(self.part(name, pin))) is not None else 0

    def discard(self, name: str) -> None:
        for suffix in (".part", ".pin"):
            (self._parts / f"{name}{suffix}").unlink(missing_ok=True)

    def publish(self, name: str, part: Path) -> None:
        """The verified half file gets its name."""
        part.replace(self.path / name)
        self.discard(name)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
