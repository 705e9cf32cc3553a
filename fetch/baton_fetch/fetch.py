"""The fetch itself: what is missing, in which order, how it is verified, when it is complete.

Small files first: as soon as they are there, routers that wait for the same folder go on. Listed content is pinned;
when the place changes under the fetch, it lists again and fetches only what differs. A wrong checksum is fetched once
more, then it is an error. Runs under the folder's lock; knows no particular kind of place.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from baton_fetch.choice import INDEX, small_files, weight_files
from baton_fetch.digests import SIZE_ONLY, Digest, hasher
from baton_fetch.errors import Changed, FetchFailed
from baton_fetch.folder import Breadth, Folder, Manifest, Verified
from baton_fetch.patience import Patience
from baton_fetch.progress import Progress
from baton_fetch.request import Request
from baton_fetch.source import RemoteFile, Snapshot, Source
from baton_fetch.transfer import Readers, Transfer
from baton_fetch.units import amount, duration

log = logging.getLogger("baton.fetch")

_LISTINGS = 5               # a place that changes more often than this during one fetch is given up
_RESERVE_BYTES = 16 << 20   # for the manifest and whoever else writes there


@dataclass(slots=True, kw_only=True)
class Fetch:
    """One folder being filled. `check()` raises when it should end."""

    request: Request
    folder: Folder
    source: Source
    readers: Readers
    patience: Patience
    progress: Progress
    check: Callable[[], None]
    _manifest: Manifest = field(init=False)

    def run(self) -> Manifest:
        """Blocks until everything is there and verified. Raises FetchFailed or Mistake; the folder stays resumable."""
        self._manifest = self._begin()
        for _ in range(_LISTINGS):
            self.progress.restart()
            try:
                self._fill(self._list())
            except Changed as change:
                log.warning("%s; fetching what differs", change)
            else:
                return self._manifest
        raise FetchFailed(f"{self.request.uri}: changes all the time; fetch again when the upload is done")

    def _begin(self) -> Manifest:
        known = self.folder.manifest()
        if known is None:
            return Manifest(uri=self.request.uri, revision=self.request.revision, endpoint=self.request.endpoint)
        self.folder.require_same(known, self.request)
        return known

    def _list(self) -> Snapshot:
        return self.patience.until_done(lambda: self.source.list_files(self._manifest.version))

    def _fill(self, snapshot: Snapshot) -> None:
        files, place = snapshot.files, self.request.uri
        small = small_files(files, place=place, only_tokenizer=self.request.only_tokenizer)
        had = self._manifest.complete
        self._keep(replace(self._manifest, version=snapshot.version))
        self._bring(files, small)
        if self.request.only_tokenizer:
            # a folder that was whole stays whole only if its weights are still those of the listing
            weights_stand = had is Breadth.ALL and not self._missing(files, self._manifest.files)
            return self._finish(Breadth.ALL if weights_stand else Breadth.TOKENIZER, self._manifest.files)
        self._finish(Breadth.TOKENIZER, self._manifest.files)
        index = (self.folder.path / INDEX).read_text() if INDEX in small else None
        weights = weight_files(files, index, place=place)
        self._bring(files, weights)
        now = self._list().files    # files of two uploads would make a model of their own
        if changed := [name for name in (*small, *weights) if now.get(name) != files[name]]:
            raise Changed(f"{changed[0]} has changed")
        return self._finish(Breadth.ALL, [*small, *weights])

    def _bring(self, files: Mapping[str, RemoteFile], names: Iterable[str]) -> None:
        wanted = list(names)
        missing = self._missing(files, wanted)
        self.progress.total_bytes += sum(files[name].size_bytes for name in wanted)
        self.progress.reused_bytes += sum(files[name].size_bytes for name in wanted if name not in missing)
        self._check_space([files[name] for name in missing])
        for name in missing:
            self._bring_one(files[name])

    def _missing(self, files: Mapping[str, RemoteFile], names: Iterable[str]) -> list[str]:
        def stands(name: str) -> bool:
            known, remote = self._manifest.files.get(name), files.get(name)
            if known is None or remote is None:
                return False
            same = known.pin == remote.pin and known.size_bytes == remote.size_bytes
            return same and self.folder.has(name, known)

        return [name for name in names if not stands(name)]

    def _check_space(self, files: Iterable[RemoteFile]) -> None:
        needed = sum(file.size_bytes - self.folder.part_bytes(file.name, file.pin) for file in files)
        if needed <= 0:
            return
        free = shutil.disk_usage(self.folder.path).free
        if needed + _RESERVE_BYTES > free:
            raise FetchFailed(
                f"{self.request.uri}: needs {amount(needed)}, {amount(free)} free at {self.folder.path}; "
                "give the model volume more room, or use spec.model.cacheClaim"
            )

    def _bring_one(self, file: RemoteFile) -> None:
        digest = self.patience.until_done(lambda: self.source.digest_of(file))
        for attempt in (1, 2):
            found = self._transfer(file, digest)
            if digest.algorithm == SIZE_ONLY or found == digest.value:
                break
            self.folder.discard(file.name)
            what = f"{file.name}: {digest.algorithm} is {found}, should be {digest.value}"
            if attempt == 2:
                raise FetchFailed(f"{self.request.uri}: {what}, twice; upload the file again")
            log.warning("%s; fetching it again", what)
        self.folder.publish(file.name, self.folder.part(file.name, file.pin))
        entry = Verified(size_bytes=file.size_bytes, pin=file.pin, algorithm=digest.algorithm, digest=found)
        self._keep(replace(self._manifest, files={**self._manifest.files, file.name: entry}))

    def _transfer(self, file: RemoteFile, digest: Digest) -> str:
        running = hasher(digest, file.size_bytes)
        transfer = Transfer(
            source=self.source, readers=self.readers, patience=self.patience, progress=self.progress, check=self.check
        )
        transfer.complete(file, self.folder.part(file.name, file.pin), running)
        return running.digest().hex()

    def _finish(self, breadth: Breadth, names: Iterable[str]) -> None:
        files = {name: self._manifest.files[name] for name in names}
        self._keep(replace(self._manifest, complete=breadth, files=files))

    def _keep(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.folder.write_manifest(manifest)


def summary(request: Request, manifest: Manifest, progress: Progress) -> str:
    """Of a fetch that succeeded, in one line."""
    by: dict[str, int] = {}
    for file in manifest.files.values():
        by[file.algorithm] = by.get(file.algorithm, 0) + 1
    verified = ", ".join(
        f"{count} by {'size alone (the place has no checksum)' if name == SIZE_ONLY else name}"
        for name, count in sorted(by.items())
    )
    version = f" at {manifest.version[:12]}" if manifest.version else ""
    return (
        f"{request.uri}{version}: {len(manifest.files)} files, {amount(manifest.total_bytes)} in {request.folder}; "
        f"fetched {amount(progress.fetched_bytes)} in {duration(progress.seconds)} ({progress.rate / 1e6:.1f} MB/s); "
        f"verified {verified}"
    )
