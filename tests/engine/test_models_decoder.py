"""Decoder: who hears of written layers and when, what a step without samples does, and where padding goes."""

from dataclasses import fields, replace

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.driver import Driver

from baton_engine.exec.device import open_device
from baton_engine.models.loader import load_model

TOKENS = list(range(20, 90))


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory, device):
    folder = tiny_checkpoint("gemma2", tmp_path_factory.mktemp("decoder"), num_hidden_layers=5, layer_types=None)
    return load_model(folder, device=device, dtype="float32")


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (2, [(0, 2), (2, 4), (4, 5)]),
        (5, [(0, 5)]),
        (99, [(0, 5)]),
    ],
)
def test_layers_are_reported_in_groups_and_in_order(model, device, group, expected):
    driver, seen = Driver(model, device), []
    inputs = driver.inputs([(driver.row(TOKENS), 70)], [0])
    model.decoder.forward(inputs, driver.pool, on_layers=lambda *layers: seen.append(layers), layer_group=group)
    assert seen == expected


@pytest.mark.parametrize("sample", [[], [0]])
def test_reported_layers_have_their_kv_in_the_pool_and_later_ones_do_not(model, device, sample):
    driver, checks = Driver(model, device), []
    row = driver.row(TOKENS)
    inputs = driver.inputs([(row, 70)], sample)

    def check(begin, end):
        written = [bool(driver.pool.layer(layer)[row.pages[0]].isfinite().all()) for layer in range(5)]
        checks.append(written == [layer < end for layer in range(5)])

    model.decoder.forward(inputs, driver.pool, on_layers=check, layer_group=2)
    assert checks == [True, True, True]


def test_a_step_without_samples_stores_the_same_kv_and_returns_no_logits(model, device):
    one, two = Driver(model, device), Driver(model, device)
    logits = model.decoder.forward(one.inputs([(one.row(TOKENS), 70)], []), one.pool)
    model.decoder.forward(two.inputs([(two.row(TOKENS), 70)], [0]), two.pool)
    assert logits.shape == (0, 320)
    assert torch.equal(one.pool.tensor.nan_to_num(7.0), two.pool.tensor.nan_to_num(7.0))


def test_logits_come_in_the_order_of_the_sample_index(model, device):
    driver = Driver(model, device)
    rows = [driver.row(TOKENS[:count]) for count in (30, 1, 12)]
    inputs = driver.inputs([(row, len(row.tokens)) for row in rows], [0, 1, 2])
    forward = model.decoder.forward(inputs, driver.pool)
    turned = replace(inputs, sample_index=inputs.sample_index.flip(0))
    assert torch.equal(model.decoder.forward(turned, driver.pool), forward.flip(0))
    assert forward.dtype == torch.float32


def test_only_the_tokens_of_the_step_are_written(model, device):
    driver = Driver(model, device)
    row = driver.row(TOKENS)
    model.decoder.forward(driver.inputs([(row, 70)], []), driver.pool)
    written = driver.pool.tensor.isfinite()
    expected = torch.zeros_like(written)
    expected[row.pages[0]] = True
    expected[row.pages[1], :, :, :, :6] = True
    assert torch.equal(written, expected)


def test_padding_rows_on_the_dummy_page_change_nothing(model, device):
    driver = Driver(model, device)
    row = driver.row(TOKENS)
    driver.step((row, 70))
    plain = driver.inputs([(row, 1)], [0])
    padding = {
        "input_ids": torch.zeros(1, dtype=torch.int64),
        "positions": torch.zeros(1, dtype=torch.int64),
        "write_pages": torch.tensor([driver.pool.dummy_page]),
        "write_offsets": torch.zeros(1, dtype=torch.int64),
        "kv_lens": torch.ones(1, dtype=torch.int32),
        "page_table": torch.full((1, 2), driver.pool.dummy_page, dtype=torch.int32),
        "cu_q": torch.tensor([2], dtype=torch.int32),
    }
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    values |= {name: torch.cat((values[name], more)) for name, more in padding.items()}
    padded = replace(plain, **(values | {"cu_q_host": (0, 1, 2), "kv_lens_host": (*plain.kv_lens_host, 1)}))
    expected = model.decoder.forward(plain, driver.pool)
    assert torch.allclose(model.decoder.forward(padded, driver.pool), expected, atol=1e-6)


def test_two_pools_of_one_model_do_not_see_each_other(model, device):
    one, two = Driver(model, device, seed=1), Driver(model, device, seed=2)
    expected = one.logits(TOKENS)
    two.logits(list(reversed(TOKENS)))
    assert torch.equal(one.logits(TOKENS), expected)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_a_bfloat16_pool_under_a_float32_model_costs_only_rounding(family, tmp_path, device):
    model = load_model(tiny_checkpoint(family, tmp_path), device=device, dtype="float32")
    driver = Driver(replace(model, dtype="bfloat16"), device)
    assert driver.pool.tensor.dtype == torch.bfloat16
    error = (driver.logits(TOKENS, chunks=(33,)) - Driver(model, device).logits(TOKENS)).abs()
    assert 0 < error.mean() < 0.05
