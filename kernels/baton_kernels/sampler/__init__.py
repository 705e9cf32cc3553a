"""Choosing tokens from float32 logits: one package, three operations, and the math that they share.

`reference` is that math in torch: the specification, and what a CPU runs. `sample` chooses one token per position with
all parameters of a request; `logprobs` reports on it; `verify` judges drafted tokens. The lanes of the kernels (noise,
order of floats) are in `lanes`.
"""

from __future__ import annotations

from baton_kernels.registry import Family, Implementation, anywhere
from baton_kernels.sampler.cases import cases
from baton_kernels.sampler.logprobs import FAMILY as LOGPROBS
from baton_kernels.sampler.logprobs import TorchLogprobs, TritonLogprobs
from baton_kernels.sampler.logprobs import scratch as logprobs_scratch
from baton_kernels.sampler.reference import (
    CANDIDATES,
    argmax,
    draw,
    draw_truncated,
    log_probabilities,
    matched,
    mix_,
    noise_bits,
    noise_keys,
    penalise_,
    race_,
    truncate,
)
from baton_kernels.sampler.sample import Flags, SampleShape, TorchSample, TritonSample, Work, configs, refuses
from baton_kernels.sampler.verify import FAMILY as VERIFY
from baton_kernels.sampler.verify import TorchVerify, TritonVerify, VerifyShape

VOCABULARIES = (32000, 128256, 151936, 201088, 262144)
"""Of the models that we serve: Llama 2 and 3, Qwen, GPT-OSS, Gemma."""

SAMPLE: Family[SampleShape, TorchSample | TritonSample] = Family(
    op="sample",
    implementations=(
        Implementation(name="triton", refuses=refuses, bind=TritonSample, configs=configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchSample(shape)),
    ),
    shapes=lambda _capabilities: [SampleShape(vocab=vocab) for vocab in VOCABULARIES],
    cases=cases,
    expects={"scan_logits": ("wide load",)},
)

__all__ = [
    "CANDIDATES",
    "LOGPROBS",
    "SAMPLE",
    "VERIFY",
    "VOCABULARIES",
    "Flags",
    "SampleShape",
    "TorchLogprobs",
    "TorchSample",
    "TorchVerify",
    "TritonLogprobs",
    "TritonSample",
    "TritonVerify",
    "VerifyShape",
    "Work",
    "argmax",
    "draw",
    "draw_truncated",
    "log_probabilities",
    "logprobs_scratch",
    "matched",
    "mix_",
    "noise_bits",
    "noise_keys",
    "penalise_",
    "race_",
    "truncate",
]
