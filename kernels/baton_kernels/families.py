"""Every family of kernels, for those who look at all of them: tests, benchmark, `baton explain kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton_kernels import norm
from baton_kernels.registry import Family

FAMILIES: Sequence[Family[Any, Any]] = (norm.FAMILY,)
