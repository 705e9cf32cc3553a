"""API keys: those of the settings, and a folder with one file per tenant that may change while the router runs.

The folder is meant to be a mounted Kubernetes Secret: the visible files are links into `..data`, itself a link to a
dated folder, and an update swaps that one link. A read that saw such a swap is done again, so what is read is one
version of the Secret. Invariants: with a folder the endpoint is never open, also when the folder is empty; what cannot
be read changes nothing; no key is written anywhere, and only digests of keys are held.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from baton_common.clock import Clock
from baton_common.errors import ConfigError

log = logging.getLogger("baton.router.keys")

REREAD_S = 2.0
"""A Secret lies in memory and is small: to read it again costs less than to be wrong about whether it changed."""
_SWAPS = 5
_SECRET_DATA = "..data"


class KeysUnreadable(Exception):
    """The folder cannot be read as a whole; says why, and never what was in it."""


class ApiKeys:
    """Who may ask. Use from one thread. A request sees keys that are at most REREAD_S old."""

    def __init__(self, given: Sequence[str], folder: Path | None, clock: Clock) -> None:
        """Raises ConfigError when the folder is not there or cannot be read."""
        self._given = {_digest(key): f"api-keys-{number}" for number, key in enumerate(given, start=1)}
        self._folder = folder
        self._clock = clock
        self._mounted: Mapping[bytes, str] = {}
        self._problem = ""
        self._empty = False
        self._read_at_s = clock.now()
        if folder is None:
            return
        try:
            self._take(read_folder(folder))
        except KeysUnreadable as error:
            raise ConfigError(
                f"router.api_keys_folder: {error}; mount a Secret there, or create the folder with one file per key",
                param="api_keys_folder",
            ) from None

    @property
    def needed(self) -> bool:
        """False = everybody may ask."""
        return bool(self._given) or self._folder is not None

    def tenant(self, key: str) -> str | None:
        """Whose key it is; None = nobody's. The time it takes does not tell how much of a key was right."""
        self._refresh()
        asked = _digest(key)
        found: str | None = None
        for known in (self._mounted, self._given):
            for digest, tenant in known.items():
                if hmac.compare_digest(digest, asked):
                    found = tenant
        return found

    def _refresh(self) -> None:
        now_s = self._clock.now()
        if self._folder is None or now_s - self._read_at_s < REREAD_S:
            return
        self._read_at_s = now_s
        try:
            self._take(read_folder(self._folder))
        except KeysUnreadable as error:
            problem = str(error)
            if problem != self._problem:  # once, not with every read
                log.error("%s; the keys read before stay in force; look at the volume or the folder's mode", problem)
            self._problem = problem

    def _take(self, tenants: Mapping[str, Sequence[str]]) -> None:
        mounted: dict[bytes, str] = {}
        for tenant, keys in tenants.items():
            for key in keys:
                mounted.setdefault(_digest(key), tenant)
        if self._problem:
            log.info("the API keys can be read again")
        if mounted != self._mounted:
            log.info("API keys read", extra={"tenants": sorted(set(mounted.values())), "keys": len(mounted)})
        if not mounted and not self._given and not self._empty:
            log.warning("%s holds no API key: every request is refused until one is added", self._folder)
        self._problem, self._mounted, self._empty = "", mounted, not mounted


def read_folder(folder: Path) -> dict[str, list[str]]:
    """Tenant (file name) -> its keys, one per line without the space around it. Raises KeysUnreadable."""
    for _ in range(_SWAPS):
        version = _version(folder)
        try:
            found = _read_files(folder / version)
        except FileNotFoundError:
            if not version:
                raise KeysUnreadable(f"{folder} is not there") from None
            continue  # this version was swapped out and removed
        except OSError as error:
            raise KeysUnreadable(f"{error.filename or folder} cannot be read: {error.strerror}") from None
        if _version(folder) == version:  # else its files may have been on their way out while they were listed
            return found
    raise KeysUnreadable(f"{folder} points to files that are not there")


def _version(folder: Path) -> str:
    """The dated folder that a mounted Secret's `..data` points to; "" for a folder of plain files."""
    try:
        return os.readlink(folder / _SECRET_DATA)
    except OSError:
        return ""


def _read_files(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:  # taken away since it was listed, or a link to nothing
            continue
        except UnicodeDecodeError:
            raise KeysUnreadable(f"{path} is no UTF-8 text") from None
        found[path.name] = [key for line in lines if (key := line.strip())]
    return found


def _digest(key: str) -> bytes:
    """Equally long for all keys, so that a comparison tells nothing of their length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
