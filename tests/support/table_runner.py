"""A runner whose decoder is a table of logits: what a step does, without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baton_common.ids import PageId, RequestId, RowId
from baton_engine.exec.device import Device
from baton_engine.exec.pool import KvPool
from baton_engine.exec.runner import Runner
from baton_engine.request import SamplingParams
from baton_engine.step import Form, RowAdmission, RowWork, StepInputs, StepPlan
from baton_kvtransfer.layout import PageLayout

VOCAB = 40


class Table:
    """A decoder whose logits are a row of a table, and that reports two groups of layers."""

    rows = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def __init__(self, device: Device) -> None:
        self._rows = device.run(lambda: self.rows.to(device.torch_device))

    def forward(self, inputs: StepInputs, pool: KvPool, *, on_layers: Any, layer_group: int) -> Tensor:
        for group in range(2 if on_layers else 0):
            on_layers(group * layer_group, (group + 1) * layer_group)
        return self._rows.index_select(0, inputs.input_ids.index_select(0, inputs.sample_index))


def runner_on(device: Device) -> Runner:
    """A runner of `Table`, with room for three rows."""
    pool = KvPool(PageLayout(layers=1, kv=2, heads=1, page_tokens=16, dim=4, dtype="float32"), 4, device)
    decoder: Any = Table(device)
    return Runner(decoder, pool, device, rows=3, context_tokens=30, vocab=VOCAB, eos_token_ids=[0], layer_group=2)


def two_rows(**sampling: Any) -> StepPlan:
    """A first step of two rows, whose last tokens are 3 and 8."""
    rows = ((0, [1, 2, 3]), (2, [7, 8]))
    return StepPlan(
        number=1,
        form=Form.RAGGED,
        admissions=tuple(
            RowAdmission(
                request_id=RequestId(f"r{row}"), row=RowId(row), sampling=SamplingParams(**sampling), tokens=tuple(ids),
                prompt_tokens=len(ids),
            )
            for row, ids in rows
        ),
        work=tuple(
            RowWork(
                request_id=RequestId(f"r{row}"), row=RowId(row), start=0, count=len(ids), sample=True,
                output_position=0, input_ids=tuple(ids), first_new_page=0, new_pages=(PageId(row),),
            )
            for row, ids in rows
        ),
    )  # fmt: skip
