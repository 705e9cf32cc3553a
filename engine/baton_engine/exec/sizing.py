"""How many KV pages a worker gets. Pure: the device says what memory there is.

Invariant: the pool holds at least one full context, so that every accepted request can finish alone.
"""

from __future__ import annotations

from baton_common.errors import ConfigError
from baton_engine.config import EngineConfig
from baton_kvtransfer.layout import PageLayout


def kv_pages(
    config: EngineConfig, layout: PageLayout, context_tokens: int, *, available: int, device_fraction: float
) -> int:
    """Pages of the pool: `config.pages`, else `config.kv_bytes`, else what all rows could use, within a fraction of
    `available` bytes: `config.kv_memory_fraction`, or this worker's part of the device's own where that is 0.
    ConfigError, naming the setting and a number that works, when one context does not fit."""
    needed = -(-context_tokens // layout.page_tokens)
    page_bytes = layout.page_bytes
    if config.pages:
        return _checked(config.pages, needed, context_tokens, "pages", str(needed))
    if config.kv_bytes:
        return _checked(config.kv_bytes // page_bytes, needed, context_tokens, "kv_bytes", str(needed * page_bytes))
    most = int(available * (config.kv_memory_fraction or device_fraction / config.device_sharers)) // page_bytes
    fraction = needed * page_bytes / max(available, 1)
    if fraction < 0.9:
        remedy = f"{fraction + 0.005:.2f}"
        return min(_checked(most, needed, context_tokens, "kv_memory_fraction", remedy), config.max_rows * needed)
    remedy = str(max(most, 1) * layout.page_tokens)
    return min(_checked(most, needed, context_tokens, "context_tokens", remedy), config.max_rows * needed)


def _checked(pages: int, needed: int, context_tokens: int, setting: str, remedy: str) -> int:
    if pages < needed:
        raise ConfigError(
            f"a KV pool of {pages} pages does not hold one context of {context_tokens} tokens ({needed} pages); "
            f"set {setting} to {remedy}",
            param=setting,
        )
    return pages
