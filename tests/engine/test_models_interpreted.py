"""Whole decoders on Triton kernels under the interpreter: the logits of the torch references, step by step.

The kernels run on CPU tensors as they would on an H200. Runs with TRITON_INTERPRET=1: `make kernels`.
"""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import FAMILIES, tiny_checkpoint
from support.driver import Driver

from baton_engine.exec.device import open_device
from baton_engine.models.loader import load_model
from baton_kernels.capabilities import named
from baton_kernels.library import Library
from baton_kernels.rt.language import INTERPRETED

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]
PAGE = 16


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_on_kernels_makes_the_logits_of_the_references(family, device, tmp_path):
    folder = tiny_checkpoint(family, tmp_path, num_hidden_layers=2, layer_types=None)
    library = Library(named("sm_90"))
    drivers = [
        Driver(load_model(folder, device=one, dtype="float32", page_tokens=PAGE), one, page_tokens=PAGE)
        for one in (device, replace(device, library=library))
    ]
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 300, (count,), generator=random).tolist() for count in (45, 3)]
    expected, got = (_play(driver, *prompts) for driver in drivers)
    assert {choice.implementation for choice in library.choices} == {"triton"}
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def _play(driver, first, second):
    """Logits of a chunk that fills pages in part, of the rest beside another prompt, and of a step of decode."""
    long, short = driver.row(first), driver.row(second)
    steps = ([(long, 30)], [(long, 14), (short, 2)], [(long, 1), (short, 1)])
    return torch.cat(
        [driver.model.decoder.forward(driver.inputs(work, list(range(len(work)))), driver.pool) for work in steps]
    )
