"""What is moved: 64 MiB in pages of one size, each page at a random place on both sides, so that nothing can be merged.

In the three plain shapes a page of one layer is one contiguous run of 4 KiB, 64 KiB or 1 MiB, which is also what the
peers move with one descriptor each. `LLAMA` is the pool of a real model (8 layers of Llama 3 8B, pages of 16 tokens):
the same 4 KiB runs, sixteen to a page and layer, which a chunk puts into another order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from baton_common.ids import PageId
from baton_common.memory import large_pages
from baton_kvtransfer import AxisOrder, PageLayout, TransferConfig

BY_LAYER = AxisOrder.LAYER_PAGE_KV_HEAD_TOKEN_DIM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    layout: PageLayout
    pages: int
    unit_bytes: int  # contiguous in the pool

    @property
    def bytes(self) -> int:
        return self.pages * self.layout.page_bytes

    @property
    def units(self) -> int:
        return self.bytes // self.unit_bytes

    @property
    def tokens(self) -> int:
        return self.pages * self.layout.page_tokens

    def pool(self, *, seed: int) -> torch.Tensor:
        """Every page of it, touched, in memory as workers have it; of random bytes, zeros for seed 0."""
        layout = self.layout
        words = torch.frombuffer(large_pages(self.bytes), dtype=torch.int16).zero_()
        if seed:
            words.random_(-(2**15), 2**15 - 1, generator=torch.Generator().manual_seed(seed))
        return words.view(torch.bfloat16).as_strided(layout.shape(self.pages), layout.strides(self.pages))

    def table(self, *, seed: int) -> list[PageId]:
        """All pages in random order."""
        pages = [PageId(page) for page in range(self.pages)]
        random.Random(seed).shuffle(pages)
        return pages


def plain(name: str, *, layers: int, page_tokens: int, dim: int, pages: int) -> Shape:
    layout = PageLayout(
        layers=layers, kv=1, heads=1, page_tokens=page_tokens, dim=dim, dtype="bfloat16", order=BY_LAYER
    )
    return Shape(name=name, layout=layout, pages=pages, unit_bytes=layout.page_bytes // layers)


KIB_4 = plain("4 KiB", layers=8, page_tokens=16, dim=128, pages=2048)
KIB_64 = plain("64 KiB", layers=8, page_tokens=128, dim=256, pages=128)
MIB_1 = plain("1 MiB", layers=4, page_tokens=128, dim=4096, pages=16)
_CONFIG = TransferConfig()
RING = plain("slots", layers=1, page_tokens=128, dim=_CONFIG.slot_bytes // 256, pages=_CONFIG.slots_per_peer)
"""All slots of a link: what is under way at once stays in the caches of the processor."""

LLAMA = Shape(
    name="Llama 8B, 4 KiB runs",
    layout=PageLayout(layers=8, kv=2, heads=8, page_tokens=16, dim=128, dtype="bfloat16"),
    pages=128,
    unit_bytes=4096,
)
SMALL = Shape(
    name="16 KiB",
    layout=PageLayout(layers=1, kv=1, heads=1, page_tokens=64, dim=128, dtype="bfloat16"),
    pages=4,
    unit_bytes=16384,
)
