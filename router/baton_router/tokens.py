"""Text to prompts: template and tokeniser, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from baton_common.errors import InvalidRequest
from baton_common.hashing import page_hashes, salted_root, token_bytes
from baton_common.ids import PageHash
from baton_router.checkpoint import Checkpoint

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of one prompt, their form on the wire, and page hashes per (root, page size), made when first asked."""

    ids: tuple[int, ...]
    raw: bytes
    text: str
    cache_salt: str
    _hashes: dict[tuple[bytes, int], list[PageHash]] = field(default_factory=dict)

    def hashes(self, root: bytes, page_tokens: int) -> Sequence[PageHash]:
        """Hashes of the full pages; the last token is left out, because its logits must be computed anyway."""
        key = (root, page_tokens)
        found = self._hashes.get(key)
        if found is None:
            salted = salted_root(PageHash(root), self.cache_salt)
            found = self._hashes[key] = page_hashes(salted, self.ids[:-1], page_tokens)
        return found


class PromptMaker:
    """Owns the tokeniser threads."""

    def __init__(self, checkpoint: Checkpoint, threads: int = 2) -> None:
        self._checkpoint = checkpoint
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="baton-tokenise")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run template and tokeniser work without holding up the streams."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def from_template(self, text: str, cache_salt: str) -> Prompt:
        """The template wrote its own special tokens: none are added. Blocks for about 1 us per token."""
        return self._prompt(text, self._checkpoint.tokenizer.encode(text, add_special_tokens=False).ids, cache_salt)

    def from_text(self, text: str, cache_salt: str) -> Prompt:
        """Plain text gets the checkpoint's special tokens, but never a second begin-of-sequence."""
        ids = self._checkpoint.tokenizer.encode(text, add_special_tokens=True).ids
        bos = self._checkpoint.bos_token
        if bos and text.startswith(bos) and len(ids) > 1:
            bos_id = self._checkpoint.tokenizer.token_to_id(bos)
            if ids[0] == ids[1] == bos_id:
                ids = ids[1:]
        return self._prompt(text, ids, cache_salt)

    def from_ids(self, ids: Sequence[int], cache_salt: str) -> Prompt:
        """The client did it. Raises InvalidRequest for an id outside the vocabulary."""
        size = self._checkpoint.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {size}", param="prompt")
        return self._prompt(self._checkpoint.tokenizer.decode(list(ids)), ids, cache_salt)

    def _prompt(self, text: str, ids: Sequence[int], cache_salt: str) -> Prompt:
        return Prompt(ids=tuple(ids), raw=token_bytes(ids), text=text, cache_salt=cache_salt)
