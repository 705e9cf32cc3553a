"""Names for the small integers and strings that must not be mixed up."""

from typing import NewType

PageId = NewType("PageId", int)
"""Index of a page in one worker's KV pool."""

RowId = NewType("RowId", int)
"""Index of a running request in one worker's device-resident request table."""

RequestId = NewType("RequestId", str)
"""Unique for ever; made by the router, or by the caller of an engine."""

TransferId = NewType("TransferId", str)
"""Names one handoff; incarnation of the receiver + a counter, so it is never reused."""

PageHash = NewType("PageHash", bytes)
"""16 bytes; identity of a full page and of everything before it (see `hashing`)."""
