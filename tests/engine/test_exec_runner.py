"""Runner: inputs of each form, the device-resident table and last tokens, results one step late, typed errors."""

import threading

import numpy as np
import pytest
import torch

from baton_common.errors import BatonError
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_engine.exec.runner import Runner
from baton_engine.request import SamplingParams
from baton_engine.step import Form, RowAdmission, RowWork, StepPlan
from baton_kvtransfer.layout import PageLayout

VOCAB, PAGE = 50, 16
GREEDY = SamplingParams(temperature=0.0)


class Successor:
    """A decoder whose next token is the last one plus one; keeps what it was given."""

    def __init__(self):
        self.seen = []
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, inputs, pool, *, on_layers, layer_group):
        assert self.gate.wait(5.0)
        self.seen.append(inputs)
        if on_layers is not None:
            on_layers(0, layer_group)
        last = inputs.input_ids[inputs.sample_index]
        return torch.nn.functional.one_hot((last + 1) % VOCAB, VOCAB).float()


@pytest.fixture
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


@pytest.fixture
def decoder():
    return Successor()


@pytest.fixture
def runner(device, decoder):
    pool = KvPool(PageLayout(layers=1, kv=2, heads=1, page_tokens=PAGE, dim=4, dtype="float32"), 30, device)
    return Runner(
        decoder, pool, device,
        rows=6, context_tokens=100, vocab=VOCAB, eos_token_ids=[0], layer_group=3,
    )  # fmt: skip


def item(row, start, ids, *, count=None, sample=True, first_new_page=0, new_pages=()):
    return RowWork(
        request_id=f"r{row}", row=row, start=start, count=count or len(ids), sample=sample, output_position=0,
        input_ids=tuple(ids), first_new_page=first_new_page, new_pages=tuple(new_pages),
    )  # fmt: skip


def carried(row, start, **more):
    return item(row, start, (), count=1, **more)


def plan(number, form, *work, new=()):
    admissions = [
        RowAdmission(request_id=f"r{row}", row=row, sampling=GREEDY, tokens=(1,), prompt_tokens=1) for row in new
    ]
    return StepPlan(number=number, form=form, admissions=tuple(admissions), work=tuple(work))


def run(runner, step):
    return runner.launch(step, None).collect(5.0)


def test_a_ragged_step_gets_positions_pages_and_offsets_of_every_token(runner, decoder):
    ids = list(range(1, 21))
    result = run(
        runner,
        plan(
            1, Form.RAGGED,
            item(4, 0, ids, new_pages=(7, 9)),
            item(2, 0, [30, 31, 32], sample=False, new_pages=(3,)),
            item(0, 5, [44], first_new_page=0, new_pages=(5,)),
            new=(0, 2, 4),
        ),
    )  # fmt: skip
    assert result.tokens == [21, 45]
    seen = decoder.seen[0]
    assert seen.input_ids.tolist() == [*ids, 30, 31, 32, 44]
    assert seen.positions.tolist() == [*range(20), 0, 1, 2, 5]
    assert seen.write_pages.tolist() == [7] * 16 + [9] * 4 + [3] * 3 + [5]
    assert seen.write_offsets.tolist() == [*range(16), *range(4), 0, 1, 2, 5]
    assert seen.cu_q.tolist() == [0, 20, 23, 24] == list(seen.cu_q_host)
    assert seen.kv_lens.tolist() == [20, 3, 6] == list(seen.kv_lens_host)
    assert seen.page_table.shape == (3, 2)
    assert seen.page_table[0].tolist() == [7, 9]
    assert seen.page_table[1:, 0].tolist() == [3, 5]
    assert seen.sample_index.tolist() == [19, 23]
    assert (seen.cu_q.dtype, seen.page_table.dtype, seen.input_ids.dtype) == (torch.int32, torch.int32, torch.int64)


def test_sampled_tokens_are_carried_on_the_device_into_steps_launched_before_they_are_collected(runner, decoder):
    decoder.gate.clear()
    first = runner.launch(
        plan(1, Form.RAGGED, item(1, 0, [10, 11], new_pages=(1,)), item(3, 0, [20], new_pages=(2,)), new=(1, 3)), None
    )
    second = runner.launch(plan(2, Form.DECODE, carried(3, 1), carried(1, 2)), None)
    third = runner.launch(plan(3, Form.RAGGED, carried(1, 3), item(5, 0, [40, 41], new_pages=(4,)), new=(5,)), None)
    assert not first.fence.done()
    decoder.gate.set()
    assert [handle.collect(5.0).tokens for handle in (first, second, third)] == [[12, 21], [22, 13], [14, 42]]
    assert third.fence.done()
    assert decoder.seen[2].input_ids.tolist() == [13, 40, 41]


def test_a_decode_step_may_mix_carried_and_known_tokens(runner, decoder):
    run(runner, plan(1, Form.RAGGED, item(0, 0, [10, 11], new_pages=(1,)), new=(0,)))
    result = run(runner, plan(2, Form.DECODE, carried(0, 2), item(1, 7, [33], new_pages=(2,)), new=(1,)))
    assert result.tokens == [13, 34]
    assert decoder.seen[1].write_offsets.tolist() == [2, 7]


def test_pages_added_later_extend_the_row_and_a_new_owner_replaces_them(runner, decoder):
    run(runner, plan(1, Form.RAGGED, item(2, 0, list(range(16)), new_pages=(8,)), new=(2,)))
    run(runner, plan(2, Form.DECODE, carried(2, 16, first_new_page=1, new_pages=(6,))))
    assert decoder.seen[1].page_table.tolist() == [[8, 6]]
    assert decoder.seen[1].write_pages.tolist() == [6]
    run(runner, plan(3, Form.RAGGED, item(2, 0, [1, 2], new_pages=(0,)), new=(2,)))
    assert decoder.seen[2].page_table.tolist() == [[0]]


def test_a_step_without_samples_makes_no_tokens(runner):
    result = run(runner, plan(1, Form.RAGGED, item(0, 0, [1, 2, 3], sample=False, new_pages=(1,)), new=(0,)))
    assert (result.tokens, result.logprobs) == ([], [])


def test_layers_are_reported_on_the_device_thread_with_the_plan(runner):
    calls = []
    step = plan(1, Form.RAGGED, item(0, 0, [1], new_pages=(1,)), new=(0,))
    runner.launch(step, lambda *what: calls.append((*what, threading.current_thread().name))).collect(5.0)
    assert calls == [(step, 0, 3, "baton-device")]


def test_a_failing_model_raises_at_collect_and_a_hanging_one_is_a_typed_error(runner, decoder):
    decoder.gate.clear()
    handle = runner.launch(plan(1, Form.RAGGED, item(0, 0, [1], new_pages=(1,)), new=(0,)), None)
    with pytest.raises(BatonError, match="step 1 did not end"):
        handle.collect(0.01)
    decoder.forward = None
    broken = runner.launch(plan(2, Form.DECODE, carried(0, 1)), None)
    decoder.gate.set()
    with pytest.raises(TypeError):
        broken.collect(5.0)


def test_random_chunks_cover_a_sequence_exactly_as_one_chunk_does(runner, decoder):
    random = np.random.default_rng(1)
    tokens, pages = random.integers(0, VOCAB, 90).tolist(), [11, 3, 29, 0, 17, 5]
    start, number = 0, 0
    while start < 90:
        count, number = min(int(random.integers(1, 23)), 90 - start), number + 1
        had, has = -(-start // PAGE), -(-(start + count) // PAGE)
        chunk = item(1, start, tokens[start : start + count], first_new_page=had, new_pages=pages[had:has])
        run(runner, plan(number, Form.RAGGED, chunk, new=(1,) if number == 1 else ()))
        start += count
    seen = {
        name: torch.cat([getattr(one, name) for one in decoder.seen]).tolist()
        for name in ("input_ids", "positions", "write_pages", "write_offsets")
    }
    assert seen["input_ids"] == tokens
    assert seen["positions"] == list(range(90))
    assert seen["write_pages"] == [pages[at // PAGE] for at in range(90)]
    assert seen["write_offsets"] == [at % PAGE for at in range(90)]
    assert decoder.seen[-1].page_table.tolist() == [pages]
