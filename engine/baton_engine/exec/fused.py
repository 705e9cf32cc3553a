"""Choosing tokens with one sequence of kernels for any mix of rows: the mix is a table of a few integers per position.

A step of greedy rows uploads nothing; any other uploads that table, and the biases when there are some.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from baton_engine.exec.choosing import Choose, Ids, Need, Tables, Upload, Wanted
from baton_kernels.sampler import SampleShape, TritonLogprobs, TritonSample, Work, logprobs_scratch


class Fused:
    """A GPU's chooser. Owns the kernels' scratch memory, which steps share because they follow each other."""

    def __init__(
        self,
        sample: TritonSample,
        logprobs: TritonLogprobs,
        shape: SampleShape,
        *,
        rows: int,
        device: torch.device,
        upload: Upload,
    ) -> None:
        self._sample = sample
        self._logprobs = logprobs
        self._upload = upload
        self._workspace = shape.workspace(rows, device)
        self._scratch = logprobs_scratch(shape, rows, device)
        self._greedy = torch.zeros((rows, len(Work)), dtype=torch.int64, device=device)
        self._greedy[:, [Work.SLOT, Work.MASK]] = -1

    def greedy(self, positions: int) -> Choose:
        return self._with(self._greedy[:positions], None, None)

    def plan(self, wanted: Wanted) -> Choose:
        work = np.zeros((len(wanted.rows), len(Work)), dtype=np.int64)
        work[:, Work.ROW] = wanted.rows
        work[:, Work.POSITION] = wanted.positions
        work[:, Work.FLAGS] = wanted.needs & (Need.NOISE | Need.TRUNCATE)
        work[:, Work.SLOT] = wanted.slots
        work[:, Work.MASK] = -1
        ids: list[int] = []
        values: list[float] = []
        for at in np.flatnonzero(wanted.needs & (Need.BIAS | Need.MIN_TOKENS)).tolist():
            listed = dict(wanted.params[at].logit_bias) | dict.fromkeys(wanted.banned.get(at, ()), float("-inf"))
            work[at, [Work.LIST_BEGIN, Work.LIST_END]] = len(ids), len(ids) + len(listed)
            ids.extend(listed)
            values.extend(listed.values())
        if not ids:
            return self._with(self._upload(work), None, None)
        lists = self._upload(np.array(ids, dtype=np.int32)), self._upload(np.array(values, dtype=np.float32))
        return self._with(self._upload(work), *lists)

    def parts(self, at: Ids) -> list[Ids]:
        return [at]

    def log_probabilities(self, logits: Tensor, at: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._logprobs(logits, at, tokens, top, workspace=self._scratch)

    def _with(self, work: Tensor, ids: Tensor | None, values: Tensor | None) -> Choose:
        def choose(logits: Tensor, tables: Tables) -> Tensor:
            return self._sample(
                logits, work, tables.reals, tables.integers, tables.counts, tables.in_prompt,
                list_ids=ids, list_values=values, workspace=self._workspace,
            )  # fmt: skip

        return choose
