"""One call of the program: see that everything is there already, or take the folder's lock and fetch.

Owns the end: SIGTERM and a lost lock are looked for wherever the fetch waits. Safe to be called by many at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton_common.clock import Clock
from baton_fetch.errors import Interrupted, LockLost
from baton_fetch.fetch import Fetch, summary
from baton_fetch.folder import Folder
from baton_fetch.lock import FolderLock
from baton_fetch.patience import Patience
from baton_fetch.progress import Progress
from baton_fetch.request import Request
from baton_fetch.source import open_source
from baton_fetch.transfer import STREAMS, Readers
from baton_fetch.units import amount

log = logging.getLogger("baton.fetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times; tests shorten them."""

    contact_s: float = 5.0      # for a first answer of the place
    give_up_s: float = 300.0    # without progress, later
    beat_s: float = 5.0
    stale_s: float = 60.0       # a lock whose record stands still for so long is nobody's


@dataclass(slots=True, kw_only=True)
class _Vigil:
    """Tells whoever waits that it is time to end."""

    uri: str
    end: threading.Event
    lost: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.end.is_set():
            raise Interrupted(f"{self.uri}: stopped; what is fetched is kept, the next start goes on from there")
        if self.lost.is_set():
            raise LockLost

    def wait(self, seconds: float) -> None:
        self.end.wait(seconds)
        self.check()


def fetch_into(
    request: Request, *, environment: Mapping[str, str], clock: Clock, end: threading.Event,
    limits: Limits | None = None,
) -> None:  # fmt: skip
    """Returns when all that was asked for is in the folder. Raises FetchFailed, another BatonError, or OSError."""
    request.place()     # a wrong URI is said before anything is touched
    folder = Folder(request.folder)
    if _reused(folder, request):
        return
    folder.make()
    while not _fetched(request, folder, environment, clock, end, limits or Limits()):
        log.warning("another process took the folder over; waiting for it")


def _fetched(
    request: Request, folder: Folder, environment: Mapping[str, str], clock: Clock, end: threading.Event, limits: Limits
) -> bool:
    """False: the lock was lost on the way."""
    vigil = _Vigil(uri=request.uri, end=end)
    lock = FolderLock(
        folder.lock_path, clock=clock, wait=vigil.wait, lost=vigil.lost, beat_s=limits.beat_s, stale_s=limits.stale_s
    )
    try:
        held = lock.acquire(lambda: folder.satisfies(request) is not None)
        if _reused(folder, request):    # whoever had the lock has done it
            return True
        if held:
            _fetch(request, folder, environment, clock, vigil, limits)
        return held
    except LockLost:
        return False
    finally:
        lock.release()


def _fetch(
    request: Request, folder: Folder, environment: Mapping[str, str], clock: Clock, vigil: _Vigil, limits: Limits
) -> None:
    log.info("fetching %s into %s", request.uri, request.folder)
    patience = Patience(
        place=request.uri, clock=clock, wait=vigil.wait, contact_s=limits.contact_s, give_up_s=limits.give_up_s
    )
    progress = Progress(clock)
    manifest = Fetch(
        request=request, folder=folder, source=open_source(request, environment, streams=STREAMS),
        readers=Readers(STREAMS), patience=patience, progress=progress, check=vigil.check,
    ).run()  # fmt: skip
    log.info("%s", summary(request, manifest, progress))


def _reused(folder: Folder, request: Request) -> bool:
    manifest = folder.satisfies(request)
    if manifest is None:
        return False
    log.info(
        "%s: complete in %s, %d files, %s; nothing to fetch",
        request.uri, request.folder, len(manifest.files), amount(manifest.total_bytes),
    )  # fmt: skip
    return True
