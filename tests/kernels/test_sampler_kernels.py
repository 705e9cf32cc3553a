"""The sampler's kernels beyond their cases: paths of the search, exact hashes, bad input. `make kernels` runs this."""

import pytest
import torch

from baton_kernels import sampler
from baton_kernels.capabilities import named
from baton_kernels.rt.language import INTERPRETED
from baton_kernels.rt.program import InputError
from baton_kernels.sampler import Flags, SampleShape, TorchSample, TritonSample, Work

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]

CONFIG = {
    "SCAN_BLOCK": 256, "SCAN_WARPS": 4, "CHOOSE_BLOCK": 128, "CHOOSE_WARPS": 4, "PIVOTS": 8,
    "CAPACITY": 128, "WIDTH": 8,
}  # fmt: skip


def arguments(logits, requests):
    """`requests`: (temperature, top_k, top_p, min_p) per row."""
    rows, vocab = logits.shape
    work = torch.zeros((rows, len(Work)), dtype=torch.int64)
    work[:, Work.ROW] = torch.arange(rows)
    work[:, Work.POSITION] = 3
    work[:, Work.FLAGS] = torch.tensor(
        [(t > 0) * Flags.NOISE | (k > 0 or p < 1 or m > 0) * Flags.TRUNCATE for t, k, p, m in requests]
    )
    work[:, [Work.SLOT, Work.MASK]] = -1
    return {
        "logits": logits.clone(),
        "work": work,
        "reals": torch.tensor([(t, p, m, 1.0, 0.0, 0.0) for t, _, p, m in requests]),
        "integers": torch.tensor([(1000 + row, k) for row, (_, k, _, _) in enumerate(requests)]),
        "counts": torch.zeros((0, vocab), dtype=torch.int32),
        "in_prompt": torch.zeros((0, vocab), dtype=torch.bool),
    }


def both(logits, requests, config=CONFIG):
    shape = SampleShape(vocab=logits.shape[1])
    triton = TritonSample(named("sm_90"), shape, config)(**arguments(logits, requests))
    return triton.tolist(), TorchSample(shape)(**arguments(logits, requests)).tolist()


def random_logits(rows, vocab, seed, scale=3.0):
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("name", "scale", "request_"),
    [
        ("few candidates", 3.0, (1.0, 5, 1.0, 0.0)),
        ("the first bound is too high", 1.0, (1.0, 0, 0.3, 0.0)),
        ("more candidates than there is room for", 0.01, (1.0, 0, 0.9, 0.0)),
        ("more than there are groups", 3.0, (1.0, 300, 0.99, 0.0)),
        ("min-p alone", 3.0, (2.0, 0, 1.0, 0.02)),
        ("min-p cuts below what top-k leaves", 3.0, (1.0, 60, 0.999, 0.2)),
        ("top-p of nothing", 3.0, (1.0, 0, 0.0, 0.0)),
        ("top-k of everything", 3.0, (1.0, 1 << 30, 0.9, 0.0)),
    ],
)  # fmt: skip
def test_every_way_of_the_search_ends_at_the_border_of_the_reference(name, scale, request_):
    got, want = both(random_logits(3, 1400, 5, scale), [request_] * 3)
    assert got == want


def test_equal_logits_at_the_border_stay_together():
    logits = torch.full((24, 300), -50.0)
    logits[:, 7::50] = 0.0
    got, _ = both(logits, [(1.0, 2, 1.0, 0.0)] * 24)
    assert len(set(got)) > 3
    assert {token % 50 for token in got} == {7}


def test_zeros_of_either_sign_are_one_maximum():
    logits = torch.full((1, 40), -1.0)
    logits[0, 20], logits[0, 30] = -0.0, 0.0
    assert both(logits, [(0.0, 0, 1.0, 0.0)])[0] == [20]


def test_a_row_of_which_everything_is_banned_still_names_a_token():
    logits = torch.full((3, 40), float("-inf"))
    got, _ = both(logits, [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.0)])
    assert all(0 <= token < 40 for token in got)


def test_a_row_is_the_same_alone_and_among_others():
    logits = random_logits(4, 300, 1)
    requests = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 9, 1.0, 0.0), (0.8, 0, 0.9, 0.0)]
    together, _ = both(logits, requests)
    given = arguments(logits, requests)
    operation = TritonSample(named("sm_90"), SampleShape(vocab=300), CONFIG)
    for row in range(4):
        alone = {**given, "logits": logits[row : row + 1].clone(), "work": given["work"][row : row + 1].clone()}
        assert operation(**alone).tolist() == together[row : row + 1]


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("logits", lambda x: x[:, :-1], "logits has shape"),
        ("logits", lambda x: x.double(), "LOGITS is torch.float64"),
        ("logits", lambda x: x.T.contiguous().T, "logits is not contiguous"),
        ("work", lambda x: x[:1], "work has shape"),
        ("work", lambda x: x.int(), "WORK is torch.int32"),
        ("reals", lambda x: x[:, :5], "reals has shape"),
        ("counts", lambda x: x[:, :9], "counts has shape"),
        ("workspace", lambda x: (x[0][:1], x[1][:1]), "workspace is for 1 positions"),
    ],
)
def test_what_the_kernel_must_not_touch_is_named(name, spoil, said):
    given = arguments(random_logits(2, 300, 2), [(0.0, 0, 1.0, 0.0)] * 2)
    given["workspace"] = SampleShape(vocab=300).workspace(2, torch.device("cpu"))
    given[name] = spoil(given[name])
    with pytest.raises(InputError, match=said):
        TritonSample(named("sm_90"), SampleShape(vocab=300), CONFIG)(**given)


def test_more_best_tokens_than_there_is_room_for_are_refused():
    operation = sampler.TritonLogprobs(named("sm_90"), SampleShape(vocab=300), {"BLOCK": 2048, "num_warps": 4})
    at = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="at most 20"):
        operation(random_logits(1, 300, 3), at, at, 21)
