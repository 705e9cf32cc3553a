"""A fetched folder is a checkpoint: the router reads the small one, the engine loads the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.fetching import fetch
from support.hub_server import HubServer

from baton_common.checkpoint import resolve_checkpoint
from baton_engine.exec.device import open_device
from baton_engine.models.loader import load_model
from baton_fetch.request import Request
from baton_router.checkpoint import load_checkpoint


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> Path:
    original = tiny_checkpoint("llama", tmp_path / "original")
    hub.publish("acme/tiny", {path.name: path.read_bytes() for path in original.iterdir()})
    return original


def test_the_router_reads_a_folder_without_weights(hub: HubServer, published: Path, tmp_path: Path) -> None:
    fetch(Request(uri="hf://acme/tiny", folder=tmp_path / "small", endpoint=hub.url, only_tokenizer=True))
    assert resolve_checkpoint(str(tmp_path / "small")) == (tmp_path / "small").resolve()
    assert not list((tmp_path / "small").glob("*.safetensors"))
    small, whole = load_checkpoint(str(tmp_path / "small")), load_checkpoint(str(published))
    assert small.tokenizer.encode("the same").ids == whole.tokenizer.encode("the same").ids
    assert (small.template is None, small.context_tokens) == (whole.template is None, whole.context_tokens)


def test_the_engine_loads_the_whole_one(hub: HubServer, published: Path, tmp_path: Path) -> None:
    fetch(Request(uri="hf://acme/tiny", folder=tmp_path / "whole", endpoint=hub.url))
    device = open_device("cpu")
    try:
        loaded, original = (load_model(folder, device=device) for folder in (tmp_path / "whole", published))
    finally:
        device.close()
    assert loaded.digest == original.digest
    assert torch.equal(loaded.decoder.weights.embed, original.decoder.weights.embed)
