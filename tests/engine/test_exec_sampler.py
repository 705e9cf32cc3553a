"""Row sampler: a row's token is its own affair; parameters, history and state of a row come and go with its owner."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_common.errors import InvalidRequest
from baton_engine.exec.sampler import LOGPROB_FLOOR, RowSampler, validate
from baton_engine.request import SamplingParams
from baton_engine.step import RowAdmission, RowWork
from baton_kernels import sampler as math
from baton_kernels.capabilities import CPU
from baton_kernels.library import Library

VOCAB = 60
EOS = 2


def make(rows=8, library=None):
    return RowSampler(
        rows=rows, vocab=VOCAB, eos_token_ids=[EOS], device=torch.device("cpu"), upload=torch.from_numpy,
        library=Library(CPU) if library is None else library,
    )  # fmt: skip


def admission(row, sampling, prompt=(3, 4), output=()):
    return RowAdmission(
        request_id=f"r{row}", row=row, sampling=sampling, tokens=(*prompt, *output), prompt_tokens=len(prompt)
    )


def work(row, position):
    return RowWork(
        request_id=f"r{row}", row=row, start=position, count=1, sample=True, output_position=position,
        input_ids=(), first_new_page=0, new_pages=(),
    )  # fmt: skip


def logits_of(row, position):
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 * row + position)) * 2


def step(sampler, admissions, rows, position):
    batch = sampler.prepare(admissions, [work(row, position) for row in rows])
    sampled = sampler.sample(torch.stack([logits_of(row, position) for row in rows]), batch)
    return sampled.tokens.tolist(), sampled.logprob_records(batch.tops)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 7]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {5: 3.0, 9: -100.0}]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.just(True),
    top_logprobs=st.sampled_from([0, 4]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(params, min_size=2, max_size=6))
def test_a_row_samples_the_same_alone_and_in_any_batch(everyone):
    together = make()
    alone = [make() for _ in everyone]
    rows = list(range(len(everyone)))
    for position in range(5):
        admissions = [admission(row, sampling) for row, sampling in enumerate(everyone)] if position == 0 else []
        order = rows if position % 2 else rows[::-1]
        tokens, logprobs = step(together, admissions, order, position)
        for row, token, logprob in zip(order, tokens, logprobs, strict=True):
            own = [one for one in admissions if one.row == row]
            assert step(alone[row], own, [row], position) == ([token], [logprob])


def test_a_batch_of_greedy_rows_is_argmax_alone():
    sampler = make()
    tokens, logprobs = step(sampler, [admission(row, SamplingParams(temperature=0.0)) for row in range(3)], [2, 0], 0)
    assert tokens == [int(logits_of(2, 0).argmax()), int(logits_of(0, 0).argmax())]
    assert logprobs == []


def test_penalties_count_outputs_of_this_admission_and_before():
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0, repetition_penalty=1.5)
    sampler, output = make(), [7, 7, 11]
    first = [admission(1, sampling, prompt=(3, 20), output=tuple(output))]
    for position in range(3, 9):
        logits = logits_of(1, position)
        counts = torch.bincount(torch.tensor(output), minlength=VOCAB)
        in_prompt = torch.zeros(VOCAB, dtype=torch.bool)
        in_prompt[[3, 20]] = True
        expected = math.penalise_(
            logits[None], counts[None].int(), in_prompt[None],
            torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([2.0]),
        ).argmax()  # fmt: skip
        tokens, _ = step(sampler, first if position == 3 else [], [1], position)
        assert tokens == [int(expected)]
        output += tokens


def test_a_new_owner_of_a_row_inherits_nothing():
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, logit_bias={5: 100.0}, min_tokens=9)
    for heir in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, presence_penalty=1e-6)):
        sampler = make()
        step(sampler, [admission(0, sampling)], [0], 0)
        step(sampler, [], [0], 1)
        tokens, _ = step(sampler, [admission(0, heir)], [0], 2)
        assert tokens == [int(logits_of(0, 2).argmax())]


def test_histories_are_kept_apart_while_slots_are_reused_and_grown():
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    sampler, fresh = make(rows=12), make(rows=12)
    step(sampler, [admission(row, sampling) for row in range(6)], list(range(6)), 0)
    step(sampler, [admission(row, SamplingParams()) for row in range(3)], list(range(3)), 1)
    newcomers = [admission(row, sampling) for row in (7, 8, 9, 10, 11)]
    rows = [one.row for one in newcomers]
    for position in range(2, 6):
        first = newcomers if position == 2 else []
        assert step(sampler, first, rows, position) == step(fresh, first, rows, position)


def test_bias_moves_and_bans_tokens():
    sampler = make()
    tokens, _ = step(sampler, [admission(0, SamplingParams(temperature=0.0, logit_bias={17: 100.0}))], [0], 0)
    assert tokens == [17]
    best = int(logits_of(0, 1).argmax())
    tokens, _ = step(sampler, [admission(0, SamplingParams(temperature=0.0, logit_bias={best: -100.0}))], [0], 1)
    assert tokens != [best]


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, False), (True, True)])
def test_stops_are_masked_before_min_tokens(ignore_eos, expected):
    sampling = SamplingParams(
        temperature=0.0, min_tokens=2, stop_token_ids=frozenset({9}), ignore_eos=ignore_eos,
        logit_bias={EOS: 90.0, 9: 95.0},
    )  # fmt: skip
    sampler = make()
    seen = [step(sampler, [admission(0, sampling)] if n == 0 else [], [0], n)[0][0] for n in range(4)]
    assert 9 not in seen[:2]
    assert (EOS in seen[:2]) is expected
    assert seen[2:] == [9, 9]


def test_logprobs_are_after_bias_and_before_temperature():
    bias = {8: 4.0, 30: -100.0}
    sampling = SamplingParams(temperature=1.7, top_k=3, seed=5, logit_bias=bias, logprobs=True, top_logprobs=4)
    sampler = make()
    tokens, (record,) = step(sampler, [admission(0, sampling)], [0], 0)
    logits = logits_of(0, 0)
    for token, value in bias.items():
        logits[token] += value
    reference = torch.log_softmax(logits, -1)
    assert record.logprob == pytest.approx(reference[tokens[0]].item(), abs=1e-5)
    assert [token for token, _ in record.top] == reference.topk(4).indices.tolist()
    assert [value for _, value in record.top] == pytest.approx(reference.topk(4).values.tolist(), abs=1e-5)


def test_logprobs_of_masked_tokens_stay_finite():
    everything_but_one = frozenset(range(VOCAB)) - {4}
    sampling = SamplingParams(
        temperature=0.0, min_tokens=1, stop_token_ids=everything_but_one, logprobs=True, top_logprobs=3
    )
    tokens, (record,) = step(make(), [admission(0, sampling)], [0], 0)
    assert tokens == [4]
    assert record.top[0] == (4, 0.0)
    assert record.top[1][1] == LOGPROB_FLOOR


@pytest.mark.parametrize(
    ("param", "sampling"),
    [
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("top_k", {"top_k": -1}),
        ("top_p", {"top_p": 1.01}),
        ("min_p", {"min_p": -0.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("max_tokens", {"max_tokens": 0}),
        ("min_tokens", {"min_tokens": 17}),
        ("seed", {"seed": 2**64}),
        ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("top_logprobs", {"top_logprobs": 1}),
        ("logit_bias", {"logit_bias": {VOCAB: 1.0}}),
        ("logit_bias", {"logit_bias": {0: 101.0}}),
        ("logit_bias", {"logit_bias": {0: float("nan")}}),
        ("stop_token_ids", {"stop_token_ids": frozenset({-1})}),
    ],
)
def test_impossible_parameters_are_refused_by_name(param, sampling):
    with pytest.raises(InvalidRequest) as caught:
        validate(SamplingParams(**sampling), VOCAB)
    assert caught.value.param == param


def test_the_extremes_of_the_openai_api_are_accepted():
    validate(
        SamplingParams(
            temperature=2.0, top_p=0.0, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias={0: -100.0},
            seed=2**64 - 1, max_tokens=1, logprobs=True, top_logprobs=20,
        ),
        VOCAB,
    )  # fmt: skip
