"""Turns a plan into device work: the request table, the inputs of a step, forward, sample.

`launch` runs on the planning thread and computes everything that needs no device state with NumPy, over rows and tokens
at once, while the previous step still runs; one int64 upload carries it. The device part runs in stream order and alone
touches the device table. A sampled token stays on the device (`last_token`), and a copy of it goes to the host, which
looks at it when it collects: in between nothing waits for the device.
It does not know requests, pages' owners or stop rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_common.errors import BatonError
from baton_engine.exec.device import Device, Fence, Launch
from baton_engine.exec.pool import KvPool
from baton_engine.exec.sampler import RowSampler, SampleBatch, Sampled
from baton_engine.role import TokenLogprobs
from baton_engine.step import Form, RowWork, StepInputs, StepPlan

if TYPE_CHECKING:
    from baton_engine.models.decoder import Decoder

STEP_TIMEOUT_S = 600.0  # a step that takes longer is a hang, not a slow machine
OnLayers = Callable[[StepPlan, int, int], None]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step made, on the host. Both lists follow the plan's work items with `sample`."""

    number: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]  # empty when no row asked
    elapsed_s: float  # on the device


class StepHandle:
    """A launched step."""

    __slots__ = ("_launch", "_tops", "plan")

    def __init__(self, plan: StepPlan, launch: Launch[Sampled], tops: Sequence[int] | None) -> None:
        self.plan = plan
        self._launch = launch
        self._tops = tops

    @property
    def fence(self) -> Fence:
        """Done when the step touches no page any more."""
        return self._launch.fence

    def collect(self, timeout_s: float = STEP_TIMEOUT_S) -> StepResult:
        """Wait for the step. Raises what the model raised, or BatonError after `timeout_s`."""
        if not self._launch.wait(timeout_s):
            raise BatonError(f"step {self.plan.number} did not end in {timeout_s:.0f} s; the device hangs")
        sampled = self._launch.result()
        return StepResult(
            number=self.plan.number,
            tokens=sampled.tokens.tolist(),
            logprobs=sampled.logprob_records(self._tops),
            elapsed_s=self._launch.elapsed_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A step before the device: one packed upload, and where its parts are."""

    packed: Tensor  # int64[sum(sizes)]
    sizes: list[int]  # of the parts, in the order of `_unpack`
    form: Form
    width: int  # page-table columns that the step reads
    cu_q_host: tuple[int, ...]
    kv_lens_host: tuple[int, ...]
    batch: SampleBatch


class Runner:
    """Owner of the device-resident request table. `launch` is called by one thread, in order of steps."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        device: Device,
        *,
        rows: int,
        context_tokens: int,
        vocab: int,
        eos_token_ids: Iterable[int],
        layer_group: int,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._device = device
        self._layer_group = layer_group
        self._page_tokens = pool.layout.page_tokens
        columns = -(-context_tokens // self._page_tokens)
        where = device.torch_device
        self._host_table = np.zeros((rows, columns), dtype=np.int64)

        def allocate() -> tuple[RowSampler, Tensor, Tensor]:  # in stream order, as all that will touch them
            return (
                RowSampler(
                    rows=rows, vocab=vocab, eos_token_ids=eos_token_ids, device=where, upload=device.upload,
                    library=device.library,
                ),
                torch.zeros((rows, columns), dtype=torch.int32, device=where),
                torch.zeros(rows, dtype=torch.int64, device=where),
            )  # fmt: skip

        self._sampler, self._table, self._last_token = device.run(allocate)

    def launch(self, plan: StepPlan, on_layers: OnLayers | None) -> StepHandle:
        """Queue the step behind those launched before; never waits for the device.

        `on_layers(plan, begin, end)` is called on the device thread when these layers' KV of the step is in the pool.
        """
        prepared = self._prepare(plan)
        stream = self._device.stream
        layers = None if on_layers is None else lambda begin, end: stream.after(lambda: on_layers(plan, begin, end))
        launch = stream.submit(lambda: self._execute(prepared, layers))
        return StepHandle(plan, launch, prepared.batch.tops)

    # ---- planning thread ------------------------------------------------------------------------------------------
    def _prepare(self, plan: StepPlan) -> _Prepared:
        work = plan.work
        numbers = np.array(
            [(item.row, item.start, item.count, item.sample, bool(item.input_ids)) for item in work], dtype=np.int64
        )
        rows, start, count, sample, known = numbers.T
        delta_at, delta_pages = self._take_pages(work)
        kv_lens = start + count
        ends = count.cumsum()
        if plan.form is Form.DECODE:
            positions, table_rows = start, rows
        else:
            positions = np.arange(ends[-1]) + (kv_lens - ends).repeat(count)
            table_rows = rows.repeat(count)
        pages, offsets = np.divmod(positions, self._page_tokens)
        sampled = np.flatnonzero(sample)
        carried = np.flatnonzero(known == 0)
        ids: Ints = np.zeros(0, dtype=np.int64)
        if len(carried) < len(work):
            ids = np.fromiter(chain.from_iterable(item.input_ids or (0,) for item in work), np.int64, ends[-1])
        cu_q = np.concatenate(([0], ends))
        parts = (
            ids, positions, self._host_table[table_rows, pages], offsets, ends[sampled] - 1, rows[sampled],
            rows, cu_q, kv_lens, ends[carried] - 1, rows[carried], delta_at, delta_pages,
        )  # fmt: skip
        return _Prepared(
            packed=self._device.upload(np.concatenate(parts)),
            sizes=[len(part) for part in parts],
            form=plan.form,
            width=(int(kv_lens.max()) - 1) // self._page_tokens + 1,
            cu_q_host=tuple(cu_q.tolist()),
            kv_lens_host=tuple(kv_lens.tolist()),
            batch=self._sampler.prepare(plan.admissions, [item for item in work if item.sample]),
        )

    def _take_pages(self, work: Sequence[RowWork]) -> tuple[Ints, Ints]:
        """New pages into the host table; the same for the device table as flat indices and values."""
        columns = self._host_table.shape[1]
        grown = [item for item in work if item.new_pages]
        if not grown:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        at = np.concatenate(
            [np.arange(len(item.new_pages)) + (item.row * columns + item.first_new_page) for item in grown]
        )
        pages = np.fromiter(chain.from_iterable(item.new_pages for item in grown), np.int64, len(at))
        self._host_table.reshape(-1)[at] = pages
        return at, pages

    # ---- device, in stream order ----------------------------------------------------------------------------------
    def _execute(self, step: _Prepared, on_layers: Callable[[int, int], None] | None) -> Sampled:
        (
            ids, positions, write_pages, write_offsets, sample_index, sampled_rows,
            rows, cu_q, kv_lens, carried_at, carried_rows, delta_at, delta_pages,
        ) = torch.split(step.packed, step.sizes)  # fmt: skip
        if len(delta_at):
            self._table.view(-1).index_copy_(0, delta_at, delta_pages.to(torch.int32))
        if not len(ids):
            ids = self._last_token.index_select(0, carried_rows)
        elif len(carried_at):
            ids.index_copy_(0, carried_at, self._last_token.index_select(0, carried_rows))
        inputs = StepInputs(
            form=step.form,
            input_ids=ids,
            positions=positions,
            write_pages=write_pages,
            write_offsets=write_offsets,
            cu_q=cu_q.to(torch.int32),
            kv_lens=kv_lens.to(torch.int32),
            page_table=self._table[:, : step.width].index_select(0, rows),
            sample_index=sample_index,
            cu_q_host=step.cu_q_host,
            kv_lens_host=step.kv_lens_host,
        )
        logits = self._decoder.forward(inputs, self._pool, on_layers=on_layers, layer_group=self._layer_group)
        sampled = self._sampler.sample(logits, step.batch)
        self._last_token.index_copy_(0, sampled_rows, sampled.tokens)
        return sampled.to_host(self._device.download)
