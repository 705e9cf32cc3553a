"""Every family of kernels, for those who look at all of them: tests, benchmark, `baton explain kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton_kernels import activation, norm, pages, rope_kv, sampler, step
from baton_kernels.attention import merge, mla, paged, partials
from baton_kernels.registry import Family

FAMILIES: Sequence[Family[Any, Any]] = (
    norm.FAMILY,
    rope_kv.FAMILY,
    activation.FAMILY,
    pages.FAMILY,
    step.FAMILY,
    sampler.SAMPLE,
    sampler.LOGPROBS,
    sampler.VERIFY,
    paged.FAMILY,
    mla.FAMILY,
    merge.FAMILY,
    partials.FAMILY,
)
