"""Verification of drafts: whatever the drafter proposes, tokens have the target's distribution."""

import math

import pytest
import torch

from baton_kernels import sampler
from baton_kernels.capabilities import CPU, named
from baton_kernels.oracle import choices

ROWS, VOCAB, DRAFTS = 20_000, 7, 2


def chi_square_bound(freedom):
    """Far tail (about 1e-5) of chi-square, Wilson-Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 4.3 * math.sqrt(2 / (9 * freedom))) ** 3


def misfit(tokens, p):
    expected = p.double() * len(tokens)
    seen = torch.bincount(tokens, minlength=len(p))
    return float(((seen - expected) ** 2 / expected).sum())


def distributions(seed, distance):
    """Logits of the target at each place, and a drafter's probabilities so far away from them."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(DRAFTS + 1, VOCAB, generator=random) * 1.5
    near = logits[:-1] + torch.randn(DRAFTS, VOCAB, generator=random) * distance
    return logits, near.softmax(1)


def verified(draft, logits, q, *, temperature=1.0, lengths=None, seeds=None):
    rows = len(draft)
    accepted, tokens = torch.empty(rows, dtype=torch.int64), torch.empty(rows, DRAFTS + 1, dtype=torch.int64)
    sampler.TorchVerify()(
        draft,
        torch.full((rows,), DRAFTS) if lengths is None else lengths,
        logits.expand(rows, -1, -1),
        q.expand(rows, -1, -1),
        torch.full((rows,), temperature),
        torch.arange(rows) if seeds is None else seeds,
        torch.zeros(rows, dtype=torch.int64),
        accepted=accepted,
        tokens=tokens,
    )
    return accepted, tokens


def drafts_of(q, seed):
    return q.multinomial(ROWS, replacement=True, generator=torch.Generator().manual_seed(seed)).T.contiguous()


@pytest.mark.parametrize("distance", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_every_place_that_is_reached_has_the_targets_distribution(distance, temperature):
    logits, q = distributions(1, distance)
    p = (logits / temperature).softmax(1)
    accepted, tokens = verified(drafts_of(q, 2), logits, q, temperature=temperature)
    for place in range(DRAFTS + 1):
        reached = tokens[accepted >= place, place]
        assert misfit(reached, p[place]) < chi_square_bound(VOCAB - 1)


def test_drafts_are_accepted_as_often_as_the_distributions_overlap():
    logits, q = distributions(3, 1.0)
    overlap = torch.minimum(logits.softmax(1)[0], q[0]).sum().item()
    accepted, _ = verified(drafts_of(q, 4), logits, q)
    assert (accepted > 0).double().mean() == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / ROWS) ** 0.5)


def test_drafts_drawn_with_the_requests_own_noise_do_no_harm():
    logits, q = distributions(5, 1.0)
    seeds, zero = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    first = sampler.draw(q[0].log().expand(ROWS, -1), torch.ones(ROWS), *sampler.noise_keys(seeds, zero))
    draft = torch.stack([first, drafts_of(q, 6)[:, 1]], 1)
    _, tokens = verified(draft, logits, q, seeds=seeds)
    assert misfit(tokens[:, 0], logits.softmax(1)[0]) < chi_square_bound(VOCAB - 1)


def test_a_drafter_that_is_the_target_is_always_right():
    logits, _ = distributions(7, 0.0)
    q = logits[:-1].softmax(1)
    draft = drafts_of(q, 8)
    accepted, tokens = verified(draft, logits, q)
    assert (accepted == DRAFTS).all()
    assert torch.equal(tokens[:, :-1], draft)


def test_a_greedy_row_accepts_the_best_tokens_alone():
    logits, q = distributions(9, 1.0)
    best = logits.argmax(1)
    accepted, tokens = verified(drafts_of(q, 10), logits, q, temperature=0.0)
    for place in range(DRAFTS + 1):
        assert (tokens[accepted >= place, place] == best[place]).all()
    assert accepted.unique().tolist() == [0, 1, 2]


def test_nothing_is_read_from_drafts_that_do_not_count():
    logits, q = distributions(11, 1.0)
    lengths = torch.arange(ROWS) % (DRAFTS + 1)
    accepted, tokens = verified(drafts_of(q, 12), logits, q, lengths=lengths)
    assert (accepted <= lengths).all()
    for place in range(DRAFTS + 1):
        reached = tokens[(accepted >= place) & (lengths >= place), place]
        assert misfit(reached, logits.softmax(1)[place]) < chi_square_bound(VOCAB - 1)
        assert (tokens[accepted < place, place] == -1).all()


def test_matched_drafts_give_the_tokens_of_decoding_without_them():
    chosen = torch.tensor([[4, 5, 6], [4, 5, 6], [4, 5, 6], [4, 5, 6]])
    draft = torch.tensor([[4, 5], [4, 9], [9, 5], [4, 5]])
    accepted, tokens = sampler.matched(draft, torch.tensor([2, 2, 2, 1]), chosen)
    assert accepted.tolist() == [2, 1, 0, 1]
    assert tokens.tolist() == [[4, 5, 6], [4, 5, -1], [4, -1, -1], [4, 5, -1]]


@pytest.mark.parametrize(("vocab", "drafts", "why"), [(1 << 19, 4, "262144"), (1000, 16, "1 to 15"), (1000, 0, "1 to")])
def test_what_the_kernel_cannot_do_is_left_to_the_reference(vocab, drafts, why):
    (choice,) = choices(sampler.VERIFY, named("sm_90"), sampler.VerifyShape(vocab=vocab, drafts=drafts))
    assert choice.slow
    assert why in choice.reason
    assert not choices(sampler.VERIFY, CPU, sampler.VerifyShape(vocab=1000, drafts=4))[0].slow
