"""One decoder for every family: reads a ModelSpec, holds fused weights, writes KV into the pool and makes logits.

Numerics follow `transformers`: residual stream in the model's dtype, norms and softmax in float32. Layers run in order;
after a group of layers has written the KV of all tokens of the step, `on_layers` hears of it, before their attention.
It does not know requests, pages' owners or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from baton_engine.exec.pool import KvPool
from baton_engine.models.kernels import DecoderKernels, bind_kernels
from baton_engine.models.spec import ModelSpec
from baton_engine.models.weights import LayerWeights, ModelWeights
from baton_engine.step import StepInputs
from baton_kernels.attention.shape import Scores, Upload
from baton_kernels.library import Library
from baton_kernels.rope import rope_tables
from baton_kvtransfer.layout import PageLayout

OnLayers = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Weights of one layer, with what can be prepared once."""

    weights: LayerWeights
    input_norm: Tensor
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]: queries and keys are normalised in one go
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp_post_norm: Tensor | None
    rope: int  # index in the step's tables
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What all layers of one forward pass share."""

    inputs: StepInputs
    pool: KvPool
    kernels: DecoderKernels
    plans: Mapping[int | None, object]  # of the attention, by window
    ropes: tuple[tuple[Tensor, Tensor], ...]
    on_layers: OnLayers | None
    layer_group: int


class Decoder:
    """Stateless between calls but for its weights; one call at a time."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, library: Library, upload: Upload) -> None:
        """`library` and `upload` are of the device that holds the weights."""
        self.spec = spec
        self.weights = weights
        self.dtype = weights.embed.dtype
        device = weights.embed.device
        self._library = library
        self._kernels: dict[PageLayout, DecoderKernels] = {}
        self._upload = upload
        # The scale is rounded as the reference rounds it, or Gemma's embeddings are off in bfloat16.
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=self.dtype))
        self._ropes = tuple((rope.frequencies(spec.head_dim).to(device), rope.amplitude) for rope in spec.ropes)
        self._windows = tuple(dict.fromkeys(layer.window for layer in spec.layers))
        self._final_norm = self._norm_weight(weights.final_norm)
        self._layers = tuple(self._prepare(index) for index in range(len(spec.layers)))

    def forward(
        self, inputs: StepInputs, pool: KvPool, *, on_layers: OnLayers | None = None, layer_group: int = 1
    ) -> Tensor:
        """Run one step; blocks on a CPU. Returns float32[S, vocab_size], the logits of `inputs.sample_index`.

        `on_layers(begin, end)` is called on this thread after every `layer_group` layers, and after the last.
        """
        with torch.inference_mode():
            kernels = self._kernels_for(pool.layout)
            step = _Step(
                inputs=inputs,
                pool=pool,
                kernels=kernels,
                plans=self._plan(inputs, kernels),
                ropes=tuple(
                    rope_tables(inputs.positions, frequencies, amplitude, self.dtype)
                    for frequencies, amplitude in self._ropes
                ),
                on_layers=on_layers,
                layer_group=layer_group,
            )
            hidden = functional.embedding(inputs.input_ids, self.weights.embed)
            if self._embed_scale != 1.0:
                hidden *= self._embed_scale
            added: Tensor | None = None
            for index in range(len(self._layers)):
                hidden, added = self._run_layer(index, hidden, added, step)
            return self._logits(hidden, added, step)

    def _kernels_for(self, layout: PageLayout) -> DecoderKernels:
        """Those of a pool with this layout; `load_model` had them compiled for the pool it was told of."""
        bound = self._kernels.get(layout)
        if bound is None:
            bound = self._kernels[layout] = bind_kernels(self.spec, self.dtype, layout, self._library)
        return bound

    def _plan(self, inputs: StepInputs, kernels: DecoderKernels) -> Mapping[int | None, object]:
        rows = (inputs.page_table, inputs.cu_q, inputs.kv_lens, inputs.cu_q_host, inputs.kv_lens_host)
        plan = kernels.attention.plan
        return {window: plan(*rows, window=window, upload=self._upload) for window in self._windows}

    def _run_layer(self, index: int, hidden: Tensor, added: Tensor | None, step: _Step) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden]: the residual stream, changed in place. `added` is what the layer before gave and what is
        not in it yet: the next norm adds it on its way. After the last layer both have the sampled tokens only."""
        layer, weights = self._layers[index], self._layers[index].weights
        last = index + 1 == len(self._layers)
        kernels = step.kernels
        x = self._normalise(hidden, added, layer.input_norm, step)
        queries = self._project_and_store(index, x, step)
        done = index + 1
        if step.on_layers is not None and (last or done % step.layer_group == 0):
            step.on_layers((done - 1) // step.layer_group * step.layer_group, done)
        sampled = step.inputs.sample_index
        if last and sampled.shape[0] == 0:
            return hidden[:0], hidden[:0]
        kv, plan = step.pool.layer(index), step.plans[layer.scores.window]
        x = kernels.attention(queries, kv, plan, layer.scores).flatten(1)
        if last:
            # Nothing reads the other tokens any more: their KV is stored.
            x, hidden = x[sampled], hidden[sampled]
        x = functional.linear(x, weights.out, weights.out_bias)
        if layer.attention_post_norm is not None:
            x = self._normalise(x, None, layer.attention_post_norm, step)
        x = self._normalise(hidden, x, layer.mlp_norm, step)
        x = kernels.gated(functional.linear(x, weights.gate_up, weights.gate_up_bias))
        x = functional.linear(x, weights.down, weights.down_bias)
        if layer.mlp_post_norm is not None:
            x = self._normalise(x, None, layer.mlp_post_norm, step)
        return hidden, x

    def _normalise(self, hidden: Tensor, added: Tensor | None, weight: Tensor, step: _Step) -> Tensor:
        """Of hidden [T, hidden]; where there is something to add, hidden += added comes first."""
        if added is None:
            return step.kernels.norm(hidden, weight, self.spec.norm_eps)
        return step.kernels.add_norm(added, weight, self.spec.norm_eps, residual=hidden)

    def _project_and_store(self, index: int, x: Tensor, step: _Step) -> Tensor:
        """Queries [T, heads, head_dim], normalised and rotated; keys and values go to the pool."""
        spec, layer, inputs = self.spec, self._layers[index], step.inputs
        qkv = functional.linear(x, layer.weights.qkv, layer.weights.qkv_bias)
        return step.kernels.rope_kv(
            qkv.view(x.shape[0], spec.heads + 2 * spec.kv_heads, spec.head_dim),
            *step.ropes[layer.rope],
            step.pool.layer(index),
            inputs.write_pages,
            inputs.write_offsets,
            qk_norm=layer.qk_norm,
            eps=spec.norm_eps,
        )

    def _logits(self, hidden: Tensor, added: Tensor | None, step: _Step) -> Tensor:
        hidden = self._normalise(hidden, added, self._final_norm, step)
        logits = functional.linear(hidden, self.weights.head).float()
        cap = self.spec.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _norm_weight(self, weight: Tensor) -> Tensor:
        return 1.0 + weight.float() if self.spec.norm_wide else weight

    def _prepare(self, index: int) -> _Layer:
        spec, weights, layer = self.spec, self.weights.layers[index], self.spec.layers[index]
        qk_norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            per_head = [weights.q_norm] * spec.heads + [weights.k_norm] * spec.kv_heads
            qk_norm = self._norm_weight(torch.stack(per_head))
        post, mlp_post = weights.attention_post_norm, weights.mlp_post_norm
        return _Layer(
            weights=weights,
            input_norm=self._norm_weight(weights.input_norm),
            qk_norm=qk_norm,
            attention_post_norm=None if post is None else self._norm_weight(post),
            mlp_norm=self._norm_weight(weights.mlp_norm),
            mlp_post_norm=None if mlp_post is None else self._norm_weight(mlp_post),
            rope=spec.ropes.index(layer.rope),
            scores=Scores(scale=spec.query_scale, window=layer.window, softcap=spec.attention_softcap),
        )
