"""The setting `--tiers`: one text that names storage tiers and their sizes.

    host=8GiB,file=/var/kv:64GiB,mooncake=master:50051:4GiB,sessions=2GiB

Sizes come last, after a colon. What cannot work is refused here, with the part and the remedy. A disk that is full or
can only be read is no mistake of the setting: its tier turns itself off.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from baton_common.errors import ConfigError
from baton_kvtransfer.tiers import TierConfig

EXAMPLE = "host=8GiB,file=/var/kv:64GiB,mooncake=master:50051:4GiB,sessions=2GiB"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]iB?)?")
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_SESSIONS = 0.5
"""Of the host pool, for the sessions of one tenant, when nothing is said."""
_DISK = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def parse_tiers(text: str) -> TierConfig:
    """Empty = no tiers. Raises ConfigError."""
    config = TierConfig()
    seen: set[str] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in _PARTS:
            raise _refusal(part, f"no tier is called {name!r}; there are {', '.join(_PARTS)}: {EXAMPLE}")
        if not equals or not value:
            raise _refusal(part, f"it has no value; write {_PARTS[name][0]}")
        if name in seen:
            raise _refusal(part, f"{name} is there twice; name it once")
        seen.add(name)
        config = _PARTS[name][1](config, part, value)
    if seen and "host" not in seen:
        raise _refusal(text, "all tiers land in host memory; add host=8GiB, or more")
    if "sessions" not in seen:
        config = replace(config, session_bytes=int(config.host_bytes * _SESSIONS))
    return config


def check_folder(folder: str) -> None:
    """It is there, or can be made, and can be written to. Raises ConfigError; a full disk is none."""
    path = Path(folder)
    probe = path / f".{uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno not in _DISK:
            why = os.strerror(error.errno or errno.EIO)
            remedy = "give a folder that this process can write to, one for each worker"
            raise _refusal(f"file={folder}", f"it cannot be used ({why}); {remedy}") from None


def _host(config: TierConfig, part: str, value: str) -> TierConfig:
    return replace(config, host_bytes=_size(part, value, "host"))


def _file(config: TierConfig, part: str, value: str) -> TierConfig:
    folder, _, size = value.rpartition(":")
    if not folder:
        raise _refusal(part, f"it has no size; write {_PARTS['file'][0]}")
    if not Path(folder).is_absolute():
        raise _refusal(part, f"{folder!r} is no absolute path; write {_PARTS['file'][0]}")
    return replace(config, folder=folder, folder_bytes=_size(part, size, "file"))


def _mooncake(config: TierConfig, part: str, value: str) -> TierConfig:
    master, _, size = value.rpartition(":")
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise _refusal(
            part,
            f"it needs the master's host:port and the memory to lend; write {_PARTS['mooncake'][0]}, or 0 for none",
        )
    lent = 0 if size == "0" else _size(part, size, "mooncake")
    return replace(config, mooncake_master=master, mooncake_segment_bytes=lent)


def _sessions(config: TierConfig, part: str, value: str) -> TierConfig:
    return replace(config, session_bytes=_size(part, value, "sessions"))


_PARTS: Mapping[str, tuple[str, Callable[[TierConfig, str, str], TierConfig]]] = {
    "host": ("host=8GiB", _host),
    "file": ("file=/var/kv:64GiB", _file),
    "mooncake": ("mooncake=master:50051:4GiB", _mooncake),
    "sessions": ("sessions=2GiB", _sessions),
}


def _size(part: str, text: str, name: str) -> int:
    match = _SIZE.fullmatch(text)
    size = 0 if match is None else int(float(match[1]) * (1 << _UNITS[match[2][0]] if match[2] else 1))
    if size <= 0:
        raise _refusal(part, f"{text!r} is no size; write a number and KiB, MiB, GiB or TiB: {_PARTS[name][0]}")
    return size


def _refusal(part: str, why: str) -> ConfigError:
    return ConfigError(f"--tiers {part!r}: {why}", param="tiers")
