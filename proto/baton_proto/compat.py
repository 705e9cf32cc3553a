"""What of `Compat` must be equal on two workers before KV moves between them, and what is converted on the way."""

from __future__ import annotations

from baton_proto.common_pb2 import Compat

CONVERTED = frozenset({"kv_dtype", "page_tokens", "layout", "tp_size"})
"""Differences that the transfer bridges: payloads know positions and heads, not pages; dtypes are converted."""


def mismatch(ours: Compat, theirs: Compat) -> str:
    """The first field, in the order of the record, that differs and must not; "" when the two can exchange KV."""
    for field in Compat.DESCRIPTOR.fields:
        if field.name not in CONVERTED and getattr(ours, field.name) != getattr(theirs, field.name):
            return str(field.name)
    return ""


def pairing_key(compat: Compat) -> bytes:
    """Equal keys: KV can move between these two."""
    key = Compat()
    key.CopyFrom(compat)
    for name in CONVERTED:
        key.ClearField(name)
    return bytes(key.SerializeToString(deterministic=True))
