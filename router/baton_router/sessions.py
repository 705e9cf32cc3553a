"""Sessions: which KV a client wants kept between two turns, and under which name. Pure.

A session is one conversation of one tenant; what its newest answer leaves takes the place of what the one before left.
The client names it, or it is named by what all turns of a conversation have in common and other conversations have not.
It does not know where KV is kept, nor whether a worker has any room for it.
"""

from __future__ import annotations

import hashlib

import orjson

from baton_common.hashing import token_bytes
from baton_proto import worker_pb2 as wire
from baton_router.schema import CacheControl, ChatRequest, CompletionRequest, Generation
from baton_router.tokens import Prompt

OPENING_TOKENS = 64
"""Of a plain completion: its first page in the usual size."""


def keep_of(request: Generation, control: CacheControl, prompt: Prompt, tenant: str) -> wire.KvKeep:
    """What the workers are told. Takes about 1 ms per MiB of opening."""
    name = control.session or request.prompt_cache_key or _named_by_opening(request, prompt)
    return wire.KvKeep(session=name, ttl_ms=control.ttl_s() * 1000, tenant=tenant)


def _named_by_opening(request: Generation, prompt: Prompt) -> str:
    """Equal for all turns of one conversation of one user."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.user or "", prompt.cache_salt):
        digest.update(hashlib.blake2b(part.encode()).digest())
    digest.update(_opening(request, prompt))
    return f"auto-{digest.hexdigest()}"


def _opening(request: Generation, prompt: Prompt) -> bytes:
    """A chat up to its first user message; the beginning of any other prompt."""
    if not isinstance(request, ChatRequest):
        assert isinstance(request, CompletionRequest)
        return token_bytes(prompt.ids[:OPENING_TOKENS])
    messages = request.template_messages()
    spoken = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return orjson.dumps(messages[: spoken[0] + 1] if spoken else messages)
