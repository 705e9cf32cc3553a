"""Choosing tokens from float32 logits: one package, three operations, and the math that they share.

`reference` is that math in torch: the specification, and what a CPU runs. `sample` chooses one token per position with
all parameters of a request; `logprobs` reports on it; `verify` judges drafted tokens. The lanes of the kernels (noise,
order of floats) are in `lanes`.
"""

from __future__ import annotations

from baton_kernels.sampler.reference import (
    CANDIDATES,
    argmax,
    draw,
    draw_truncated,
    log_probabilities,
    mix_,
    noise_bits,
    noise_keys,
    penalise_,
    race_,
    truncate,
)

__all__ = [
    "CANDIDATES",
    "argmax",
    "draw",
    "draw_truncated",
    "log_probabilities",
    "mix_",
    "noise_bits",
    "noise_keys",
    "penalise_",
    "race_",
    "truncate",
]
