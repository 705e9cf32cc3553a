"""Whole generations through the engine equal those of `transformers`, however they are cut, shared or interrupted."""

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.engine_world import engine_world, make_request, tiny_model
from support.reference import Reference

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "qwen2")
VOCAB = 320


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (our model, the reference); made on first use."""
    made = {}

    def get(family):
        if family not in made:
            folder = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
            made[family] = tiny_model(folder), Reference(folder)
        return made[family]

    return get


def prompts(count, seed, shortest=1, longest=90):
    """Random prompts; two thirds share one of three prefixes."""
    random = np.random.default_rng(seed)
    heads = [random.integers(3, VOCAB, size).tolist() for size in (16, 37, 64)]
    tails = [random.integers(3, VOCAB, int(size)).tolist() for size in random.integers(shortest, longest, count)]
    return [tail if n % 3 == 0 else heads[n % len(heads)] + tail for n, tail in enumerate(tails)]


@pytest.mark.parametrize("family", FAMILIES)
def test_generations_equal_transformers_generate(models, family):
    model, reference = models(family)
    chosen = prompts(4, seed=1)
    with engine_world(model) as world:
        outputs = world.run(make_request(prompt, max_tokens=20) for prompt in chosen)
    assert outputs == [reference.generate(prompt, 20) for prompt in chosen]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"step_tokens": 8, "max_rows": 8}, id="chunks of eight"),
        pytest.param({"step_tokens": 13, "max_rows": 3}, id="odd chunks, few rows"),
        pytest.param({"step_tokens": 512, "max_rows": 32, "pages": 400}, id="everything at once"),
        pytest.param({"page_tokens": 64, "step_tokens": 37}, id="pages of 64"),
        pytest.param({"pages": 33, "context_tokens": 528, "max_rows": 8}, id="a pool of one context"),
    ],
)
def test_many_concurrent_generations_equal_the_reference(models, family, settings):
    model, reference = models(family)
    chosen = prompts(24, seed=2)
    with engine_world(model, **settings) as world:
        requests = [make_request(prompt, max_tokens=3 + n % 30) for n, prompt in enumerate(chosen)]
        outputs = world.run(requests)
    for prompt, request, output in zip(chosen, requests, outputs, strict=True):
        assert len(output) == request.sampling.max_tokens
        assert reference.is_greedy(prompt, output)


def test_preemption_changes_no_token(models):
    model, reference = models("llama")
    chosen = prompts(12, seed=3, shortest=20, longest=60)
    with engine_world(model, pages=20, context_tokens=320, max_rows=8, step_tokens=32) as world:
        outputs = world.run(make_request(prompt, max_tokens=60) for prompt in chosen)
        assert world.engine.stats().preemptions > 0
    for prompt, output in zip(chosen, outputs, strict=True):
        assert len(output) == 60
        assert reference.is_greedy(prompt, output)


def test_a_second_turn_finds_the_first_in_the_cache_and_continues_it(models):
    model, reference = models("qwen3")
    first = prompts(1, seed=4, shortest=50, longest=51)[0]
    with engine_world(model) as world:
        (answer,) = world.run([make_request(first, max_tokens=30)])
        second = [*first, *answer, 7, 8, 9]
        request = make_request(second, max_tokens=10)
        (output,) = world.run([request])
        told = [token.cached_tokens for token in world.role.tokens[request.request_id]]
    assert told == [(len(first) + len(answer) - 1) // 16 * 16] + [None] * 9
    assert output == reference.generate(second, 10)


def test_other_salts_share_no_cache(models):
    model, _ = models("llama")
    prompt = prompts(1, seed=5, shortest=60, longest=61)[0]
    with engine_world(model) as world:
        for salt, expected in (("a", 0), ("b", 0), ("a", 48)):
            request = make_request(prompt, max_tokens=2, cache_salt=salt)
            world.run([request])
            assert world.role.tokens[request.request_id][0].cached_tokens == expected


def test_prompts_at_page_borders_equal_the_reference(models):
    model, reference = models("llama")
    random = np.random.default_rng(6)
    chosen = [random.integers(3, VOCAB, size).tolist() for size in (1, 15, 16, 17, 31, 32, 33, 64)]
    with engine_world(model, step_tokens=16) as world:
        outputs = world.run(make_request(prompt, max_tokens=18) for prompt in chosen)
        again = world.run(make_request(prompt, max_tokens=18) for prompt in chosen)
    assert outputs == again
    assert all(reference.is_greedy(prompt, output) for prompt, output in zip(chosen, outputs, strict=True))


def test_a_moved_request_continues_after_the_outputs_it_brings(models):
    model, reference = models("llama")
    prompt = prompts(1, seed=7)[0]
    whole = reference.generate(prompt, 12)
    with engine_world(model) as world:
        request = make_request(prompt, outputs=whole[:5], max_tokens=12)
        assert world.run([request]) == [whole[5:]]
        assert world.role.tokens[request.request_id][0].position == 5


def test_an_idle_engine_takes_up_work_again(models):
    model, _ = models("llama")
    with engine_world(model) as world:
        first = world.run([make_request([5, 6, 7])])
        world.settle()
        assert world.run([make_request([5, 6, 7])]) == first


def test_steps_overlap_and_every_token_is_told_in_its_own_step(models):
    model, _ = models("llama")
    with engine_world(model) as world:
        request = make_request([9, 10, 11], max_tokens=20)
        world.run([request])
        assert world.role.steps == list(range(1, 21))
        stats = world.engine.stats()
        assert stats.steps >= 20
        assert stats.step_ms > 0
        assert stats.prefill_tokens_per_s > 0
