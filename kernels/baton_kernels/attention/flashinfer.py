"""FlashInfer's paged attention behind the same door: for NVIDIA devices, only where it is asked for by name.

Written against the source of flashinfer-python 0.6.18 (`decode.py`, `prefill.py`); nobody has run it with us yet.
The package is imported when an operation is bound. Its wrappers plan on the host, and compile at their first plan if
they were not built ahead; a plan is good for the calls until the next one, and not for a graph.
See "FlashInfer", arXiv 2501.01005. It does not know who owns a page.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton_kernels.attention.shape import AttentionShape, Rows, Scores, Upload, upload_to
from baton_kernels.attention.work import Capacity
from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.program import Config, InputError, Program

WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
HEAD_SIZES = (64, 128, 256)
TENSOR_CORES_FROM = 4  # query heads of a KV head: fewer leave most of a matrix instruction empty


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferPlan:
    """A wrapper that has planned one step."""

    wrapper: Any
    window: int | None


class FlashInferAttention:
    """The same arguments and results as `paged.TritonAttention`; its lse is to base 2 as well."""

    programs: Sequence[Program] = ()

    def __init__(self, _capabilities: Capabilities, shape: AttentionShape, _config: Config) -> None:
        self._shape = shape
        self._module = importlib.import_module("flashinfer")
        self._decode: Any = None
        self._prefill: Any = None
        self._last: tuple[Rows, int | None, FlashInferPlan] | None = None

    def plan(
        self,
        page_table: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        cu_q_host: Sequence[int],
        kv_lens_host: Sequence[int],
        *,
        window: int | None = None,
        upload: Upload | None = None,
        capacity: Capacity | None = None,
        fixed_split_tokens: int = 0,
    ) -> FlashInferPlan:
        """See `paged.TritonAttention.plan`. InputError for a capacity: its grids follow the step."""
        del cu_q, kv_lens
        if capacity is not None:
            raise InputError("FlashInfer's plans are not made for a capacity; use the Triton kernel in graphs")
        page_tokens, device = self._shape.page_tokens, page_table.device
        queries, kv = np.diff(np.asarray(cu_q_host)), np.asarray(kv_lens_host)
        used = np.flatnonzero(queries)
        pages = -(-kv[used] // page_tokens)
        ends = np.cumsum(pages)
        row = np.repeat(used, pages)
        column = np.arange(len(row)) - np.repeat(ends - pages, pages)
        flat = (upload or upload_to(device))((row * page_table.shape[1] + column).astype(np.int32))
        indices = page_table.reshape(-1)[flat.long()]
        # Its planners read these on the host; a copy on the device would only come back.
        starts = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        last = torch.from_numpy((kv[used] - (pages - 1) * page_tokens).astype(np.int32))
        options: dict[str, Any] = {
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": self._shape.softcap,
            "sm_scale": 1.0,  # a call's own scale comes in as that of the keys
            "q_data_type": self._shape.dtype,
            "kv_data_type": self._shape.kv_dtype,
        }
        if fixed_split_tokens:
            options["fixed_split_size"] = -(-fixed_split_tokens // page_tokens)
        sizes = (self._shape.heads, self._shape.kv_heads, self._shape.dim, page_tokens)
        if (queries[used] == 1).all():
            wrapper = self._wrapper(device, decode=True)
            wrapper.plan(starts, indices, last, *sizes, **options)
        else:
            wrapper = self._wrapper(device, decode=False)
            cu_used = torch.from_numpy(np.concatenate(([0], np.cumsum(queries[used]))).astype(np.int32))
            wrapper.plan(cu_used, starts, indices, last, *sizes, causal=True, **options)
        return FlashInferPlan(wrapper=wrapper, window=window)

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        plan: FlashInferPlan | Rows,
        scores: Scores,
        *,
        kv_scales: Tensor | None = None,
        tree: Tensor | None = None,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `paged.TritonAttention.__call__`."""
        assert kv_scales is None, "refused when it was bound"
        assert tree is None, "refused when it was bound"
        if isinstance(plan, Rows):
            plan = self._plan_of(plan, scores.window)
        assert plan.window == scores.window, "planned for another window"
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        halves = (kv[:, 0], kv[:, 1])
        plan.wrapper.run(q, halves, k_scale=scores.scale, out=out, lse=lse, return_lse=lse is not None)
        return out

    def _plan_of(self, rows: Rows, window: int | None) -> FlashInferPlan:
        if self._last is None or self._last[0] is not rows or self._last[1] != window:
            host = rows.cu_q_host, rows.kv_lens_host
            self._last = rows, window, self.plan(rows.page_table, rows.cu_q, rows.kv_lens, *host, window=window)
        return self._last[2]

    def _wrapper(self, device: torch.device, *, decode: bool) -> Any:
        if self._decode is None:
            space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._decode = self._module.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_tensor_cores=self._shape.group >= TENSOR_CORES_FROM
            )
            self._prefill = self._module.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
        return self._decode if decode else self._prefill


def refuses(capabilities: Capabilities, shape: AttentionShape) -> str:
    """Why it cannot, in a clause; "" = it can."""
    if capabilities.vendor != "nvidia":
        return "FlashInfer is for NVIDIA devices"
    if shape.dim not in HEAD_SIZES:
        return f"FlashInfer's head sizes are {', '.join(map(str, HEAD_SIZES))}, not {shape.dim}"
    if shape.dtype not in (torch.bfloat16, torch.float16) or shape.kv_dtype is not shape.dtype:
        return f"queries of {shape.dtype} on KV of {shape.kv_dtype}: FlashInfer is used for bfloat16 and float16 alone"
    if shape.sinks:
        return "sinks are not in every kernel of FlashInfer's"
    if shape.tree:
        return "a tree mask would have to be packed into FlashInfer's own form"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return ""
