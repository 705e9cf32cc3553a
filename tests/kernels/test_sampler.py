"""Sampler kernels: penalties and truncation as Hugging Face, noise with the right distribution and no memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton_kernels import sampler

MASK = 0xFFFFFFFF


def mix(x):
    """The specification, in Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def bits(seed, position, token):
    low, high = seed & MASK, seed >> 32 & MASK
    s0 = mix(low ^ 0x9E3779B9)
    s1 = mix(high ^ s0)
    k0 = mix(position ^ s1)
    k1 = mix(k0 + s0 & MASK)
    return mix(token * 0x9E3779B9 + k0 & MASK) ^ k1


def logits_of(rows, vocab, seed, scale=3.0):
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * scale


def keys(seeds, positions):
    return sampler.noise_keys(torch.tensor(seeds, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64))


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_the_noise_is_the_written_hash_bit_for_bit(seed, position, ids):
    k0, k1 = keys([seed], [position])
    got = sampler.noise_bits(k0, k1, torch.tensor(ids, dtype=torch.int32))
    assert [value & MASK for value in got.tolist()] == [bits(seed, position, token) for token in ids]


def test_noise_is_finite_for_all_extreme_bits():
    extremes = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    noise = sampler.race_(extremes)
    assert torch.isfinite(noise).all()
    assert noise.min() > -23
    assert noise.max() < 3


def chi_square_bound(freedom):
    """Far tail (about 1e-5) of chi-square, Wilson-Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 4.3 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("vary", ["position", "seed", "high bits of the seed"])
def test_draws_follow_the_softmax(vary):
    draws, vocab = 20_000, 24
    row = logits_of(1, vocab, 1, scale=1.5)
    count = torch.arange(draws)
    seeds = {"position": torch.full((draws,), 7), "seed": count, "high bits of the seed": count << 32}[vary]
    positions = count if vary == "position" else torch.zeros_like(count)
    tokens = sampler.draw(row.expand(draws, vocab), torch.ones(draws), *sampler.noise_keys(seeds, positions))
    expected = torch.softmax(row[0], -1) * draws
    seen = torch.bincount(tokens, minlength=vocab)
    assert ((seen - expected) ** 2 / expected).sum() < chi_square_bound(vocab - 1)


def test_neighbouring_positions_are_independent():
    draws, vocab = 20_000, 6
    row = logits_of(1, vocab, 2, scale=0.7)
    tokens = sampler.draw(row.expand(draws, vocab), torch.ones(draws), *keys([3] * draws, list(range(draws))))
    pairs = torch.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab * vocab).double()
    p = torch.softmax(row[0].double(), -1)
    expected = torch.outer(p, p).flatten() * (draws - 1)
    assert ((pairs - expected) ** 2 / expected).sum() < chi_square_bound(vocab * vocab - 1)


def test_argmax_is_the_first_maximum():
    assert sampler.argmax(torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = logits_of(3, 40, 3)
    histories = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(4))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(histories, logits.clone())
    counts, in_prompt = torch.zeros((3, 40), dtype=torch.int32), torch.zeros((3, 40), dtype=torch.bool)
    in_prompt.scatter_(1, histories[:, :5], True)
    counts.scatter_add_(1, histories[:, 5:], torch.ones((3, 7), dtype=torch.int32))
    zero = torch.zeros(3)
    got = sampler.penalise_(logits.clone(), counts, in_prompt, torch.full((3,), penalty), zero, zero)
    assert torch.equal(got, expected)


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros((1, 4))
    counts = torch.tensor([[0, 1, 3, 0]], dtype=torch.int32)
    in_prompt = torch.tensor([[True, False, False, False]])
    got = sampler.penalise_(logits, counts, in_prompt, torch.ones(1), torch.tensor([0.5]), torch.tensor([0.25]))
    assert got.tolist() == [[0.0, -0.75, -1.25, 0.0]]


def hugging_face_kept(row, temperature, top_k, top_p, min_p):
    scores = TemperatureLogitsWarper(temperature)(None, row.clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return torch.isfinite(scores)


def kept(logits, temperature, top_k, top_p, min_p, width):
    """bool like logits, and which rows say that `width` was too little."""
    scaled, ids, short = sampler.truncate(logits, temperature, top_k, top_p, min_p, width=width)
    mask = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, ids, scaled > float("-inf"))
    return mask, short


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, 64, 400]),
    st.sampled_from([0.01, 0.4, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.sampled_from([1, 8, 64, 300]),
)
def test_truncation_keeps_what_transformers_keeps_or_says_that_it_looked_at_too_little(
    seed, temperature, top_k, top_p, min_p, width
):
    logits = logits_of(2, 300, seed)
    expected = hugging_face_kept(logits, temperature, top_k, top_p, min_p)
    options = [torch.full((2,), value) for value in (temperature, top_k, top_p, min_p)]
    got, short = kept(logits, *options, width)
    assert torch.equal(got[~short], expected[~short]) or width == 300
    whole, _ = kept(logits, *options, 300)
    assert torch.equal(whole, expected)
    assert not short[expected.sum(-1) < width - 1].any() or width < top_k < 300


def test_the_width_of_the_search_never_shows():
    logits = logits_of(6, 500, 5)
    options = (
        torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 1.0]),
        torch.tensor([0, 3, 0, 400, 7, 0]),
        torch.tensor([0.99, 1.0, 0.5, 0.9, 0.2, 1.0]),
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0]),
    )
    for position in range(20):
        draws = [
            sampler.draw_truncated(logits, *options, *keys([1] * 6, [position] * 6), width=width)
            for width in (1, 16, 401, 500)
        ]
        assert all(torch.equal(draw, draws[0]) for draw in draws)


def test_a_top_p_of_zero_keeps_the_best_token():
    mask, _ = kept(logits_of(1, 50, 6), torch.ones(1), torch.tensor([0]), torch.tensor([0.0]), torch.tensor([0.0]), 50)
    assert mask.sum() == 1


def test_equal_logits_at_the_border_stay_together():
    logits = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    options = (torch.ones(1), torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    _, short = kept(logits, *options, 3)
    assert short.tolist() == [True]
    mask, _ = kept(logits, *options, 5)
    assert mask.tolist() == [[True, True, True, True, False]]


def test_a_truncated_draw_uses_the_noise_of_the_whole_draw():
    logits = logits_of(64, 200, 7)
    k0, k1 = keys(list(range(64)), [5] * 64)
    ones, none = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    everything = sampler.draw_truncated(logits, ones, none, ones, torch.zeros(64), k0, k1)
    assert torch.equal(everything, sampler.draw(logits, ones, k0, k1))
    only_best = sampler.draw_truncated(logits, ones, none, ones, ones, k0, k1)
    assert torch.equal(only_best, logits.argmax(-1))


def test_a_truncated_draw_follows_the_softmax_of_what_is_left():
    draws, vocab = 20_000, 40
    row = logits_of(1, vocab, 11, scale=1.5)
    rows, ones = row.expand(draws, vocab), torch.ones(draws)
    tokens = sampler.draw_truncated(
        rows, ones, torch.full((draws,), 6), ones, torch.zeros(draws), *keys([3] * draws, list(range(draws))), width=7
    )
    best = row[0].topk(6)
    expected = best.values.softmax(-1) * draws
    seen = torch.bincount(tokens, minlength=vocab)[best.indices]
    assert seen.sum() == draws
    assert ((seen - expected) ** 2 / expected).sum() < chi_square_bound(5)


def test_a_tiny_temperature_is_greedy_and_never_overflows():
    logits = logits_of(8, 100, 8, scale=50.0)
    logits[:, 3] = float("-inf")
    drawn = sampler.draw(logits, torch.full((8,), 1e-5), *keys([1] * 8, [0] * 8))
    assert torch.equal(drawn, logits.argmax(-1))


def test_log_probabilities_are_those_of_log_softmax():
    logits = logits_of(3, 30, 9)
    tokens = torch.tensor([4, 0, 29])
    chosen, ids, values = sampler.log_probabilities(logits, tokens, 5)
    reference = torch.log_softmax(logits.double(), -1)
    np.testing.assert_allclose(chosen, reference.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    np.testing.assert_allclose(values, reference.topk(5).values, atol=1e-5)
    assert torch.equal(ids, reference.topk(5).indices)
