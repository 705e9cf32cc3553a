"""Sampling through the whole engine: reproducible in any batch, penalties and log-probabilities as the reference."""

import pytest
import torch
from support.checkpoints import EOS_ID, tiny_checkpoint
from support.engine_world import engine_world, make_request, tiny_model
from support.reference import Reference

from baton_engine.request import FinishReason

PROMPT = [11, 57, 203, 99, 14, 300, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(folder):
    return tiny_model(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


SAMPLED = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2**63 + 5},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "seed": 1},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 3},
    {"temperature": 0.0},
]


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(model):
    def requests():
        return [make_request([*PROMPT, n], max_tokens=24, **options) for n, options in enumerate(SAMPLED)]

    with engine_world(model, step_tokens=16) as world:
        alone = [world.run([request])[0] for request in requests()]
    with engine_world(model) as world:
        noise = [make_request([5, n], temperature=1.0, seed=n, max_tokens=30) for n in range(6)]
        mixed = world.run([*noise[:3], *requests(), *noise[3:]])[3:-3]
    with engine_world(model, pages=13, context_tokens=192, max_rows=8) as world:
        tight = world.run(requests()[::-1])[::-1]
    assert mixed == alone
    assert tight == alone


def test_different_seeds_give_different_texts_and_low_temperature_the_greedy_one(model, reference):
    with engine_world(model) as world:
        outputs = world.run(make_request(PROMPT, temperature=1.0, seed=seed, max_tokens=16) for seed in range(4))
        cold = world.run([make_request(PROMPT, temperature=1e-4, seed=9, max_tokens=16)])
    assert len({tuple(output) for output in outputs}) == 4
    assert cold == [reference.generate(PROMPT, 16)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalised_request_that_moved_goes_on_as_if_it_had_stayed(model, temperature):
    options = {"temperature": temperature, "seed": 5, "frequency_penalty": 2.0, "presence_penalty": 2.0}
    options["max_tokens"] = 40
    with engine_world(model) as world:
        (whole,) = world.run([make_request(PROMPT, **options)])
        (rest,) = world.run([make_request(PROMPT, outputs=whole[:9], **options)])
    assert rest == whole[9:]


@pytest.mark.parametrize("penalty", [1.2, 0.8])
def test_repetition_penalty_equals_transformers_generate(model, reference, penalty):
    with engine_world(model) as world:
        outputs = world.run([make_request(PROMPT, repetition_penalty=penalty, max_tokens=40)])
    assert outputs == [reference.generate(PROMPT, 40, repetition_penalty=penalty)]


def test_presence_and_frequency_penalties_follow_the_documented_formula(model, reference):
    request = make_request(PROMPT, presence_penalty=1.1, frequency_penalty=0.6, max_tokens=30)
    with engine_world(model) as world:
        (output,) = world.run([request])
    logits = reference.logits([*PROMPT, *output[:-1]])[len(PROMPT) - 1 :]
    for position, row in enumerate(logits):
        counts = torch.bincount(torch.tensor(output[:position], dtype=torch.int64), minlength=len(row))
        assert (row - 0.6 * counts - 1.1 * (counts > 0)).argmax() == output[position]


def test_bias_equals_transformers_sequence_bias(model, reference):
    bias = {17: 6.0, 200: -100.0, 64: 3.0}
    with engine_world(model) as world:
        outputs = world.run([make_request(PROMPT, logit_bias=bias, max_tokens=20)])
    assert outputs == [reference.generate(PROMPT, 20, sequence_bias={(token,): value for token, value in bias.items()})]


def test_logprobs_are_the_log_softmax_of_the_reference(model, reference):
    greedy = make_request(PROMPT, logprobs=True, top_logprobs=5, max_tokens=12)
    hot = make_request(PROMPT, logprobs=True, top_logprobs=0, temperature=1.5, top_k=40, seed=3, max_tokens=12)
    plain = make_request(PROMPT, max_tokens=12)
    with engine_world(model) as world:
        outputs = world.run([greedy, plain, hot])
        heard = {request.request_id: world.role.tokens[request.request_id] for request in (greedy, plain, hot)}
    assert all(token.logprobs is None for token in heard[plain.request_id])
    for request, output, top in ((greedy, outputs[0], 5), (hot, outputs[2], 0)):
        expected = torch.log_softmax(reference.logits([*PROMPT, *output[:-1]])[len(PROMPT) - 1 :], -1)
        for token, row in zip(heard[request.request_id], expected, strict=True):
            assert token.logprobs.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
            assert [value for _, value in token.logprobs.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


def test_one_token_is_one_token(model, reference):
    request = make_request(PROMPT, max_tokens=1)
    with engine_world(model) as world:
        assert world.run([request]) == [reference.generate(PROMPT, 1)]
        (token,) = world.role.tokens[request.request_id]
    assert (token.finish, token.position, token.cached_tokens) == (FinishReason.LENGTH, 0, 0)


def test_a_stop_id_ends_the_request_and_is_its_last_token(model, reference):
    text = reference.generate(PROMPT, 24)
    stop = next(token for token in text[5:] if token not in text[:5])
    request = make_request(PROMPT, stop_token_ids=frozenset({stop}), max_tokens=24)
    with engine_world(model) as world:
        assert world.run([request]) == [text[: text.index(stop) + 1]]
        assert world.role.tokens[request.request_id][-1].finish is FinishReason.STOP


def test_the_end_of_sequence_stops_unless_it_is_ignored(model):
    bias = {EOS_ID: 100.0}
    with engine_world(model) as world:
        outputs = world.run([
            make_request(PROMPT, logit_bias=bias, ignore_eos=False, max_tokens=6),
            make_request(PROMPT, logit_bias=bias, ignore_eos=True, max_tokens=6),
            make_request(PROMPT, logit_bias=bias, ignore_eos=False, min_tokens=4, max_tokens=6),
        ])  # fmt: skip
    assert outputs[0] == [EOS_ID]
    assert outputs[1] == [EOS_ID] * 6
    assert len(outputs[2]) == 5
    assert outputs[2].index(EOS_ID) == 4


def test_the_context_ends_a_request_whose_max_tokens_is_larger(model):
    with engine_world(model, context_tokens=40) as world:
        request = make_request(PROMPT, max_tokens=1000)
        (output,) = world.run([request])
        assert len(PROMPT) + len(output) == 40
        assert world.role.tokens[request.request_id][-1].finish is FinishReason.LENGTH
