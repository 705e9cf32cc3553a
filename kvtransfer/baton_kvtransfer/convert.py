"""Converts cells of KV between dtypes, in small pieces that stay in the cache and on the calling thread.

Round to nearest even; float16 saturates. float8_e4m3fn has a factor per (layer, kv, head, token): the largest magnitude
of its `dim` values becomes the largest code; value = code * factor. A torch operation on fewer elements than its grain
does not start a team of threads, which a transfer thread must not; codes are widened by a table, as torch takes 5 times
as long (0.9 against 4.4 GB/s). The others run at 20 GB/s and more, so a conversion costs less than the copy beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CONVERTIBLE = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""Any of them into any other, widest first."""
PIECE = 32_000
"""Elements; torch's grain is 32,768."""
_CODE_MAX = 448.0
_HALF_MAX = 65504.0
_LEAST_SCALE = 1e-12
_VALUES: npt.NDArray[np.float32] = (
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """`values` [cells, dim] of any dtype in CONVERTIBLE; `scales` float32[cells] of 8-bit floats."""

    values: Tensor
    scales: npt.NDArray[np.float32] | None = None


def convert(source: Cells, target: Cells) -> None:
    """Fill `target` with what `source` holds. Both contiguous, on the host, of equal shape."""
    cells, dim = source.values.shape
    step = max(1, PIECE // dim)
    if source.scales is None and target.scales is None and target.values.dtype != torch.float16:
        for begin in range(0, cells, step):
            target.values[begin : begin + step].copy_(source.values[begin : begin + step])
        return
    wide = torch.empty(min(step, cells), dim)  # float32[piece, dim]
    for begin in range(0, cells, step):
        end = min(begin + step, cells)
        piece = wide[: end - begin]
        _widen(source, begin, end, piece)
        _narrow(piece, target, begin, end)


def _widen(source: Cells, begin: int, end: int, piece: Tensor) -> None:
    values = source.values[begin:end]
    if source.scales is None:
        piece.copy_(values)
        return
    codes = values.view(torch.uint8).numpy()
    np.take(_VALUES, codes, out=piece.numpy(), mode="clip")
    np.multiply(piece.numpy(), source.scales[begin:end, None], out=piece.numpy())


def _narrow(piece: Tensor, target: Cells, begin: int, end: int) -> None:
    """Spoils `piece`."""
    values = target.values[begin:end]
    if target.scales is not None:
        scales = piece.abs().amax(-1).div_(_CODE_MAX).clamp_(min=_LEAST_SCALE)
        target.scales[begin:end] = scales.numpy()
        piece.div_(scales.unsqueeze(-1)).clamp_(-_CODE_MAX, _CODE_MAX)
    elif values.dtype == torch.float16:
        piece.clamp_(-_HALF_MAX, _HALF_MAX)
    values.copy_(piece)
