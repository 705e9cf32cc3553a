"""Triton's language for kernel files, or a stand-in where Triton is not installed, so that references still import.

Kernel files take `jit`, `tl`, `operand` and `cast` from here. Under the interpreter (TRITON_INTERPRET=1 before the
first import) bfloat16 is plain 16-bit integers: arithmetic on it is silently wrong and casts truncate. So all
arithmetic is float32, every operand of a product goes through `operand`, and every narrowing goes through `cast`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # from 3.10 on the default would be off: other rounding, slower

tl: Any
try:
    import triton
    import triton.language

    tl = triton.language
    _major, _minor = triton.__version__.split(".")[:2]
    TRITON_VERSION: tuple[int, int] | None = (int(_major), int(_minor))
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    TRITON_VERSION = None
    INTERPRETED = False

    class _Absent:
        """Survives what happens while a kernel file is imported; no kernel ever runs."""

        def constexpr(self, value: object) -> object:
            return value

    tl = _Absent()


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit where there is Triton."""
    return function if TRITON_VERSION is None else triton.jit(function)


INTERPRET = tl.constexpr(INTERPRETED)


@jit
def operand(x):
    """`x` as an operand of tl.dot: itself on a device, float32 under the interpreter."""
    if INTERPRET:
        return x.to(tl.float32)
    else:
        return x


@jit
def cast(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded to nearest even; the interpreter alone would truncate, or lose a carry."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        elif dtype == tl.float8e4nv or dtype == tl.float8e4b8:
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
            coarse: tl.constexpr = 1.5 * 2.0**14 if dtype == tl.float8e4nv else 1.5 * 2.0**13  # steps below the normals
            small = (x + coarse) - coarse
            smallest: tl.constexpr = 2.0**-6 if dtype == tl.float8e4nv else 2.0**-7
            x = tl.where(tl.abs(x) < smallest, small, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)
