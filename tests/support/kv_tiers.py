"""A pool of KV pages with storage tiers under it, and tiers that do what a test wants."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
import torch
from prometheus_client import CollectorRegistry
from support.kv_world import LIMIT_S, eventually

from baton_common.clock import Clock, ManualClock
from baton_common.hashing import chain_root, page_hashes
from baton_common.ids import PageHash, PageId
from baton_kvtransfer import PageLayout
from baton_kvtransfer.blocks import Blocks, HostBlocks
from baton_kvtransfer.tiers import Copy, Namespace, Ticket, Tier, TierConfig, TierFault, TierMetrics, TierStack
from baton_kvtransfer.tiers.frames import FrameFormat, TierKey

LAYOUT = PageLayout(layers=2, kv=2, heads=2, page_tokens=16, dim=8, dtype="bfloat16")  # 2 KiB a page
NAMESPACE = Namespace(model_digest="m", layout=LAYOUT)
FORMAT = FrameFormat(NAMESPACE)
FRAME_BYTES = FORMAT.frame_bytes
POOL_PAGES = 64


def chain(pages: int, salt: int = 0) -> list[PageHash]:
    """Hashes of the first pages of a sequence of tokens."""
    return page_hashes(chain_root("m"), [salt] * (pages * LAYOUT.page_tokens), LAYOUT.page_tokens)


def keys_of(hashes: Sequence[PageHash]) -> list[TierKey]:
    return [FORMAT.key(page) for page in hashes]


def frame_of(key: TierKey, fill: int = 0) -> memoryview:
    """As the room writes it."""
    frame = memoryview(bytearray(FRAME_BYTES))
    payload = FORMAT.payload(frame)
    payload[:] = bytes([fill % 256]) * len(payload)
    FORMAT.label(frame, key, FORMAT.seal(key).over(payload))
    return frame


@contextmanager
def small_disk(path: Path, *, size: str) -> Iterator[Path]:
    """A file system of that size; skips where tests may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def metrics() -> TierMetrics:
    return TierMetrics(CollectorRegistry())


def value(metric, *labels: str) -> float:
    return (metric.labels(*labels) if labels else metric)._value.get()


@dataclass
class DictTier:
    """In memory. `broken` raises in every call, `before` runs first."""

    name: str = "file"
    broken: str = ""
    room: int = 1 << 30
    before: Callable[[str], None] = lambda call: None
    held: dict[TierKey, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    closed: bool = False

    @property
    def bytes(self) -> int:
        return sum(map(len, self.held.values()))

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.before(call)
        if self.broken:
            raise TierFault(self.broken)

    def open(self) -> None:
        self._enter("open")

    def has(self, keys: Sequence[TierKey]) -> int:
        self._enter("has")
        return next((count for count, key in enumerate(keys) if key not in self.held), len(keys))

    def put(self, key: TierKey, frame: memoryview) -> bool:
        self._enter("put")
        if len(self.held) >= self.room:
            return False
        self.held.setdefault(key, bytes(frame))
        return True

    def get(self, key: TierKey, out: memoryview) -> int:
        self._enter("get")
        frame = self.held.get(key, b"")
        out[: len(frame)] = frame[: len(out)]
        return len(frame)

    def delete(self, key: TierKey) -> None:
        self._enter("delete")
        self.held.pop(key, None)

    def close(self) -> None:
        self.closed = True


class TierWorld:
    """Pages of the pool are numbered; page n holds values that only n has. Closes with its `with` block."""

    def __init__(
        self,
        *tiers: Tier,
        host_pages: int = 32,
        clock: Clock | None = None,
        blocks: Callable[[torch.Tensor], Blocks] = lambda pool: HostBlocks(pool, LAYOUT),
        namespace: Namespace = NAMESPACE,
        **settings: float,
    ) -> None:
        self.clock = clock or ManualClock()
        self.metrics = metrics()
        self.pool = torch.zeros(LAYOUT.shape(POOL_PAGES), dtype=torch.bfloat16)
        for page in range(POOL_PAGES):
            self.pool[page] = torch.arange(LAYOUT.page_bytes // 2).view(LAYOUT.page_shape) % 199 + page
        config = TierConfig(host_bytes=host_pages * FRAME_BYTES, **settings)
        self.stack = TierStack(
            tiers,
            namespace=namespace,
            blocks=blocks(self.pool),
            config=config,
            clock=self.clock,
            metrics=self.metrics,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def offload(self, hashes: Sequence[PageHash], first: int = 0) -> Copy:
        """Pages `first`, … of the pool, and wait until they are in host memory."""
        pages = [PageId(page) for page in range(first, first + len(hashes))]
        return waited(self.stack.offload(hashes, pages))

    def prefetch(self, hashes: Sequence[PageHash]) -> Ticket:
        """Until no more comes."""
        ticket = self.stack.prefetch(hashes, deadline_s=self.clock.now() + LIMIT_S)
        eventually(lambda: ticket.poll().over, "the prefetch is over")
        return ticket

    def restore(self, ticket: Ticket, first: int, pages: int) -> int:
        """Into pages `first`, …; returns how many came."""
        return waited(self.stack.restore(ticket, [PageId(page) for page in range(first, first + pages)])).pages

    def restored(self, hashes: Sequence[PageHash], origin: int = 0) -> int:
        """Prefetch and restore into the last pages of the pool; how many came, each equal to its original."""
        target = POOL_PAGES - len(hashes)
        self.pool[target:] = -1
        count = self.restore(self.prefetch(hashes), target, len(hashes))
        for index in range(count):
            assert torch.equal(self.pool[target + index], self.pool[origin + index]), f"page {index} is another one"
        assert bool((self.pool[target + count :] == -1).all()), "pages that did not come are left alone"
        return count


def waited(copy: Copy) -> Copy:
    eventually(copy.done, "the copy is done")
    return copy


class Door:
    """Holds calls up until it opens."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self._opened = threading.Event()

    def wait(self) -> None:
        self.waiting.set()
        assert self._opened.wait(LIMIT_S)

    def open(self) -> None:
        self._opened.set()
