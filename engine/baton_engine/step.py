"""One step: the plan (host, pure) and the inputs (device) that the model sees.

Three forms cover everything. DECODE: one query token per row. UNIFORM(k): k per row (speculative verification).
RAGGED: anything, prefill chunks and decodes mixed. The mask is separate and belongs to the attention call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from baton_common.ids import PageId, RequestId, RowId
from baton_engine.request import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class Form(Enum):
    DECODE = "decode"
    UNIFORM = "uniform"
    RAGGED = "ragged"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdmission:
    """A request takes a row of the device-resident request table with this step."""

    request_id: RequestId
    row: RowId
    sampling: SamplingParams
    tokens: tuple[int, ...]  # prompt, and outputs made before this admission: penalties count them
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWork:
    """Positions [start, start + count) of one row are computed in this step."""

    request_id: RequestId
    row: RowId
    start: int
    count: int
    sample: bool  # the last position's logits are sampled: the row gets one token
    output_position: int  # of the sampled token, 0 = first output; meaningless without `sample`
    input_ids: tuple[int, ...]  # count ids; empty = the one input is last_token[row], still on the device
    first_new_page: int  # index in the row's page table where new_pages go
    new_pages: tuple[PageId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step computes. Made by the scheduler, executed by the runner; rank 0 would broadcast it."""

    number: int
    form: Form
    admissions: tuple[RowAdmission, ...]
    work: tuple[RowWork, ...]

    @property
    def tokens(self) -> int:
        return sum(item.count for item in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Device tensors of one step. T = query tokens, B = rows, P = page-table width, S = sampled rows.

    A query token t of row b attends to positions [0, positions[t]] of its own row (window permitting).
    """

    form: Form
    input_ids: Tensor  # int64[T]
    positions: Tensor  # int64[T]
    write_pages: Tensor  # int64[T]   page that receives the token's K and V
    write_offsets: Tensor  # int64[T]   token slot inside that page
    cu_q: Tensor  # int32[B+1] row b owns query tokens [cu_q[b], cu_q[b+1])
    kv_lens: Tensor  # int32[B]   tokens of the row after this step's writes
    page_table: Tensor  # int32[B, P]
    sample_index: Tensor  # int64[S]   positions in [0, T) whose logits are wanted
    cu_q_host: tuple[int, ...]  # the same on the host: the CPU reference loops over rows, GPUs do not read it
    kv_lens_host: tuple[int, ...]
