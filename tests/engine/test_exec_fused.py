"""The kernels' way to choose tokens gives those of the CPU's way. `make kernels` runs this under the interpreter."""

import pytest
import torch

from baton_engine.exec.sampler import RowSampler
from baton_engine.request import SamplingParams
from baton_engine.step import RowAdmission, RowWork
from baton_kernels.capabilities import CPU, named
from baton_kernels.library import Library
from baton_kernels.rt.language import INTERPRETED

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]

VOCAB = 90
EVERYONE = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=2**64 - 1),
    SamplingParams(temperature=1.3, top_k=5, seed=1, logprobs=True, top_logprobs=4),
    SamplingParams(temperature=0.7, top_p=0.8, seed=2, frequency_penalty=1.0, repetition_penalty=1.4),
    SamplingParams(temperature=0.0, presence_penalty=2.0, logprobs=True),
    SamplingParams(temperature=1.0, min_p=0.1, seed=3, logit_bias={5: 9.0, 9: -100.0}, min_tokens=2),
    SamplingParams(temperature=0.0, logit_bias={2: 50.0, 7: 49.0}, min_tokens=1),
]


def sampler(library):
    return RowSampler(
        rows=8, vocab=VOCAB, eos_token_ids=[2], device=torch.device("cpu"), upload=torch.from_numpy, library=library
    )  # fmt: skip


def admissions(everyone):
    return [
        RowAdmission(request_id=f"r{row}", row=row, sampling=one, tokens=(3, 4, 5, 5), prompt_tokens=2)
        for row, one in enumerate(everyone)
    ]


def work(row, position):
    return RowWork(
        request_id=f"r{row}", row=row, start=position, count=1, sample=True, output_position=position,
        input_ids=(), first_new_page=0, new_pages=(),
    )  # fmt: skip


def generate(library, everyone, positions):
    """Tokens and log-probabilities of each step; rows take turns in their order."""
    own, found = sampler(library), []
    for position in range(positions):
        rows = list(range(len(everyone)))[:: 1 if position % 2 else -1]
        random = torch.Generator().manual_seed(position)
        logits = (torch.randn(len(everyone), VOCAB, generator=random) * 2)[rows].contiguous()
        batch = own.prepare(admissions(everyone) if position == 0 else [], [work(row, position) for row in rows])
        sampled = own.sample(logits, batch)
        found.append((sampled.tokens.tolist(), sampled.logprob_records(batch.tops)))
    return found


def test_any_mix_of_rows_gets_the_tokens_of_the_cpu():
    expected = generate(Library(CPU), EVERYONE, 4)
    for (tokens, records), (cpu_tokens, cpu_records) in zip(
        generate(Library(named("sm_90")), EVERYONE, 4), expected, strict=True
    ):
        assert tokens == cpu_tokens
        for record, cpu_record in zip(records, cpu_records, strict=True):
            assert (record is None) == (cpu_record is None)
            if record is not None:
                assert record.logprob == pytest.approx(cpu_record.logprob, abs=1e-4)
                assert [token for token, _ in record.top] == [token for token, _ in cpu_record.top]


def test_greedy_rows_need_no_upload():
    library = Library(named("sm_90"))
    uploads = []
    own = RowSampler(
        rows=8, vocab=VOCAB, eos_token_ids=[2], device=torch.device("cpu"),
        upload=lambda array: uploads.append(array) or torch.from_numpy(array), library=library,
    )  # fmt: skip
    batch = own.prepare(admissions(EVERYONE[:1]), [work(0, 0)])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    assert own.sample(logits, batch).tokens.tolist() == logits.argmax(-1).tolist()
    assert uploads == []
