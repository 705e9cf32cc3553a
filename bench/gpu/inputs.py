"""Inputs of a family's cases: made on the device, several sets of them, and their size without making any.

A case is made under `with device`, with a generator of that device: 17 GB of KV are drawn where they stay. Sets differ
by seed, so that a call finds nothing of the one before in a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from baton_kernels.registry import Call, Case

ROTATION_BYTES = 256 << 20  # several times the largest cache: 60 MB on an H200, 126 MB on a B200
MOST_SETS = 64


SMALL_BYTES = 64 << 20  # a case that moves less may be made on the host only to learn its size


class SizeUnknown(Exception):
    """A large case that looks at values while it is made: its size is not known before."""


def make(case: Case[Any], device: torch.device, seed: int) -> Call:
    """One set of inputs on `device`."""
    with device:
        return case.make(torch.Generator(device).manual_seed(seed), device)


def sets(case: Case[Any], device: torch.device, size: int) -> list[Call]:
    """So many sets that together they are larger than any cache. `size`: bytes of one."""
    count = min(max(1, -(-ROTATION_BYTES // max(size, 1))), MOST_SETS)
    return [make(case, device, seed) for seed in range(count)]


def argument_bytes(case: Case[Any], device: torch.device) -> int:
    """Memory of one set on `device`, which need not be there: no large case is allocated. SizeUnknown."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            return held_bytes(case.make(torch.Generator().manual_seed(0), device).arguments)
    except (DataDependentOutputException, RuntimeError) as error:
        if case.traffic.bytes > SMALL_BYTES:
            raise SizeUnknown(" ".join(str(error).split())[:100]) from error
    return held_bytes(make(case, torch.device("cpu"), 0).arguments)


def held_bytes(arguments: object) -> int:
    """Bytes of all storages behind the tensors of a structure, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors(arguments)}
    return sum(storage.nbytes() for storage in storages.values())


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a structure of mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
