"""Servers on loopback, and a checkpoint to be fetched from them. Its weights are any bytes: nobody looks inside."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator

import pytest
from support.fetching import SHARDS, SMALL, UNWANTED
from support.hub_server import HubServer
from support.s3_server import S3Server


@pytest.fixture
def files() -> dict[str, bytes]:
    """A checkpoint in two shards, with what repositories have besides."""
    chance = random.Random(7)
    return {
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "tokenizer.json": chance.randbytes(30_000),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
        SHARDS[0]: chance.randbytes(3_000_000),
        SHARDS[1]: chance.randbytes(700_001),
        **dict.fromkeys(UNWANTED, b"not needed"),
    }


@pytest.fixture
def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in (*SMALL, *SHARDS)}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, and its credentials in this process's environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    name = f"models-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return name
