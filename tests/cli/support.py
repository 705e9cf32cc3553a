"""Tiny processes to supervise: shell scripts instead of routers and workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from baton.supervisor import Command, Policy

QUICK = Policy(first_pause_s=0.01, longest_pause_s=0.05, stable_s=30.0, crashes=4, grace_s=5.0)


def script(folder: Path, name: str, body: str, *, wave: int = 1) -> Command:
    """A command that runs `body` in a shell, in `folder`."""
    return Command(
        name=name, role="decode", argv=("/bin/sh", "-c", f"cd '{folder}'; {body}"),
        environment={"PATH": "/usr/bin:/bin"}, address="127.0.0.1:1", log=folder / f"{name}.log", wave=wave,
    )  # fmt: skip


def alive(pid: int) -> bool:
    """True while the process runs; a zombie is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def eventually(check: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait until `check` holds; the limit only ends a test that has failed anyway."""
    deadline_s = time.monotonic() + within_s
    while not check():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"did not come true within {within_s} s")
        await asyncio.sleep(0.01)


def read_pid(file: Path) -> int:
    """The pid a script wrote, 0 when it has not yet."""
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0
