"""Prefill and decode as two processes on one GPU, in the dtype that is served: their tokens are no further from those
of `transformers` in float32 than the tokens of `transformers` in bfloat16 are. (That float32 tokens are equal is shown
by tests/worker/test_pd_processes.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.pd import connected, no_page_is_held, prompts, side_by_side, status
from support.processes import Service, spawn_service
from support.reference import Reference

from baton_engine.request import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.process, pytest.mark.timeout(600)]

OUTPUTS = 12
ROUNDING = 2.0  # times what bfloat16 does to `transformers`: another order of sums rounds elsewhere
ODD_CHUNKS = {"step_tokens": 41, "max_rows": 16}
SHAPES = {
    "llama": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
    "mistral": {"head_dim": 64},
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 64},
}
"""Head sizes of real models: the ones of tiny checkpoints are smaller than a tile."""


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("model"), seed=7, **SHAPES[request.param])


@pytest.fixture(scope="module")
def service(gpu_device: torch.device, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    settings = {"device": str(gpu_device), "dtype": "bfloat16", **ODD_CHUNKS}
    with spawn_service(folder, checkpoint, router=False, **settings) as service:
        yield service


def behind_best(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How much lower the logit of each token is than the best one's."""
    return logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]


def rounding_of_transformers(exact: Reference, checkpoint: Path) -> torch.Tensor:
    """How far `transformers` in bfloat16 is behind, at every position of other prompts: over ten thousand, because the
    largest of a few hundred varies threefold."""
    rounded = Reference(checkpoint, torch.bfloat16)
    return torch.cat(
        [behind_best(exact.logits(prompt), rounded.logits(prompt).argmax(-1)) for prompt in prompts(200, seed=2)]
    )


async def test_served_tokens_are_as_good_as_those_of_transformers(service: Service, checkpoint: Path) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
    questions = [(prompt, greedy) for prompt in prompts(40, seed=1)]
    async with connected(service) as pair:
        answers = await side_by_side(questions, pair.ask)
    exact = Reference(checkpoint)
    ours = []
    for (prompt, _), answer in zip(questions, answers, strict=True):
        tokens = [token.token_id for token in answer]
        logits = exact.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        ours.append(behind_best(logits, torch.tensor(tokens)))
    served, allowed = torch.cat(ours), rounding_of_transformers(exact, checkpoint)
    assert served.max() <= ROUNDING * allowed.max()
    assert served.mean() <= ROUNDING * allowed.mean()
    assert (await status(service.prefill[0])).load.handoffs >= len(questions)
    for process in service.workers:
        await no_page_is_held(process)
