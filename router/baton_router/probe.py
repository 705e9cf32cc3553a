"""Proof that KV pages cross from one prefill worker to one decode worker, by a small handoff of a prompt nobody has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton_router.links import Link

Verdict = Literal["proved", "failed", "busy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """`busy`: a worker was full or draining, which says nothing about the transport; ask again later."""

    verdict: Verdict
    message: str
    seconds: float = 0.0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return self.verdict == "proved"


async def probe(prefill: Link, decode: Link, *, vocab_size: int, deadline_s: float = 10.0) -> ProbeResult:
    """Hand a few pages from `prefill` to `decode`. Takes at most `deadline_s`; raises nothing but cancellation."""
    raise NotImplementedError
