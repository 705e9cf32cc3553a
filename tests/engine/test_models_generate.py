"""Greedy generations equal `transformers.generate` token for token, however the steps are cut and mixed."""

import pytest
import torch
from support.checkpoints import FAMILIES, tiny_checkpoint
from support.driver import Driver
from transformers import AutoModelForCausalLM

from baton_engine.exec.device import open_device
from baton_engine.models.loader import load_model

NEW = 70  # with any prompt this crosses a page border
LENGTHS = (1, 40, 63, 64, 65, 130)


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory, device):
    folder = tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(folder, device=device, dtype="float32")


@pytest.fixture(scope="module")
def prompts():
    random = torch.Generator().manual_seed(7)
    return [torch.randint(0, 320, (length,), generator=random).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(model, prompts):
    """Prompt and continuation of each prompt."""
    reference = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    rows = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist()
        for prompt in prompts
    ]
    assert all(len(set(row[len(prompt) :])) > 8 for row, prompt in zip(rows, prompts, strict=True)), "a dull reference"
    return rows


def finish(driver, rows, wanted):
    while any(len(row.tokens) < length for row, length in zip(rows, wanted, strict=True)):
        driver.step(*((row, 1) for row, length in zip(rows, wanted, strict=True) if len(row.tokens) < length))


def test_whole_prompts_in_one_ragged_step_then_batched_decode(model, device, prompts, expected):
    driver = Driver(model, device)
    rows = [driver.row(prompt) for prompt in prompts]
    driver.step(*((row, len(row.tokens)) for row in rows))
    finish(driver, rows, [len(row) for row in expected])
    assert [row.tokens for row in rows] == expected


def test_odd_chunks_while_others_decode_and_join_late(model, device, prompts, expected):
    driver = Driver(model, device, seed=3)
    random = torch.Generator().manual_seed(11)
    rows, wanted = [], []
    waiting = list(zip(prompts, expected, strict=True))
    while waiting or any(len(row.tokens) < length for row, length in zip(rows, wanted, strict=True)):
        if waiting:
            prompt, full = waiting.pop()
            rows.append(driver.row(prompt))
            wanted.append(len(full))
        work = []
        for row, length in zip(rows, wanted, strict=True):
            left = len(row.tokens) - row.stored
            if len(row.tokens) < length and left:
                work.append((row, min(left, int(torch.randint(1, 38, (1,), generator=random)))))
        driver.step(*work)
    assert [row.tokens for row in reversed(rows)] == expected


def test_a_prefix_hit_continues_on_the_pages_of_another_row(model, device, prompts, expected):
    driver = Driver(model, device, seed=5)
    first = driver.row(prompts[-1])
    driver.step((first, len(first.tokens)))
    finish(driver, [first], [len(expected[-1])])
    second = driver.row(prompts[-1], reuse=first)
    assert second.stored == 128
    assert second.pages == first.pages[:2]
    driver.step((second, len(second.tokens) - second.stored))
    finish(driver, [second], [len(expected[-1])])
    assert second.tokens == first.tokens == expected[-1]


def test_a_recomputed_row_goes_on_where_it_was(model, device, prompts, expected):
    """After a preemption or the loss of a worker: prompt and outputs so far are prefilled again, on other pages."""
    driver = Driver(model, device, seed=6)
    moved = driver.row(expected[1][: len(prompts[1]) + 33])
    driver.step((moved, len(moved.tokens)))
    finish(driver, [moved], [len(expected[1])])
    assert moved.tokens == expected[1]
