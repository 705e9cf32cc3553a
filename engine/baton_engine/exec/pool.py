"""The KV pool of one rank as a tensor: logical axes (page, layer, kv, head, token, dim), physical order by strides.

One page more than asked for: index `dummy_page` takes the writes of padding rows and is never in a real page table.
Memory starts zeroed and only computed or verified KV is written, yet readers must not rely on that: a page keeps what
its last owner wrote. It does not know who owns a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from baton_common.errors import ConfigError
from baton_common.ids import PageId
from baton_common.memory import large_pages
from baton_engine.exec.device import Device
from baton_kvtransfer.layout import PageLayout

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class KvPool:
    """Owner of the tensor; everything else holds views of it."""

    def __init__(self, layout: PageLayout, pages: int, device: Device) -> None:
        """Allocates (pages + 1) * layout.page_bytes. ConfigError when it does not fit or the dtype is not supported."""
        dtype = TORCH_DTYPES.get(layout.dtype)
        if dtype is None:
            raise ConfigError(f"KV dtype {layout.dtype!r} is not supported; use one of {', '.join(TORCH_DTYPES)}")
        if pages < 1:
            raise ConfigError(f"a KV pool needs at least one page, got {pages}")
        shape = layout.shape(pages + 1)
        try:
            storage = device.run(lambda: _zeros(prod(shape), dtype, device.torch_device))
        except torch.AcceleratorError:
            raise  # a broken device, whatever was asked of it
        except (RuntimeError, OSError, OverflowError):
            wanted = (pages + 1) * layout.page_bytes / 2**30
            free = device.available_bytes() / 2**30
            raise ConfigError(
                f"no memory for {pages} KV pages: they take {wanted:.1f} GiB, {device.name} has {free:.1f} GiB; "
                f"ask for fewer pages, or lower kv_bytes or kv_memory_fraction",
                param="pages",
            ) from None
        self.layout = layout
        self.pages = pages
        self.dummy_page = PageId(pages)
        self.tensor: Tensor = storage.as_strided(shape, layout.strides(pages + 1))
        """[pages + 1, layer, kv, head, token, dim], strided."""
        self._layers = tuple(self.tensor[:, index] for index in range(layout.layers))

    def layer(self, index: int) -> Tensor:
        """View [pages + 1, kv, head, token, dim] of one layer; made once, so it costs nothing in a step."""
        return self._layers[index]


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.frombuffer(large_pages(count * dtype.itemsize), dtype=dtype)
