"""Inputs of `sample`: each kind of request alone and all of them in one step; and the floor, one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton_kernels.registry import Call, Case, Traffic
from baton_kernels.sampler.sample import Flags, SampleShape

H200_BYTES_PER_S = 4.3e12  # copies of large buffers, measured once
FIXED_S = 10e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one position asks."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalised: bool = False
    biases: int = 0
    masked: bool = False

    @property
    def flags(self) -> Flags:
        flags = Flags(0)
        if self.temperature:
            flags |= Flags.NOISE
        if self.top_k or self.top_p < 1.0 or self.min_p:
            flags |= Flags.TRUNCATE
        return flags


GREEDY = Request()
PLAIN = Request(temperature=0.8)
TOP_K = Request(temperature=1.2, top_k=7)
TOP_P = Request(temperature=0.7, top_p=0.9)
MIN_P = Request(temperature=1.5, min_p=0.1)
EVERYTHING = Request(
    temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, penalised=True, biases=5, masked=True
)  # fmt: skip


def model(shape: SampleShape, requests: Sequence[Request]) -> Traffic:
    """Reads the logits once; of penalised positions also counts and prompt, and writes the logits."""
    logits = len(requests) * shape.vocab
    penalised = sum(request.penalised for request in requests) * shape.vocab
    return Traffic(bytes=logits * 4 + penalised * (4 + 4 + 1), flops=2 * logits)


def _call(
    shape: SampleShape, requests: Sequence[Request], spread: float, random: torch.Generator, device: torch.device
) -> Call:
    vocab, positions = shape.vocab, len(requests)
    integer = partial(torch.randint, generator=random)
    slots = max(1, sum(request.penalised for request in requests))
    work, ids, values = _work(shape, requests, random)
    reals = [(one.temperature, one.top_p, one.min_p, 1.3, 0.5, 0.25) for one in requests]
    seeds = integer(-(2**62), 2**62, (positions, 1))
    arguments = {
        "logits": torch.randn(positions, vocab, generator=random) * spread,
        "work": work,
        "reals": torch.tensor(reals, dtype=torch.float32).view(positions, 6),
        "integers": torch.cat([seeds, torch.tensor([one.top_k for one in requests]).view(-1, 1)], 1).long(),
        "counts": integer(-20, 3, (slots, vocab)).clamp_(min=0).int(),
        "in_prompt": integer(0, 20, (slots, vocab)) == 0,
        "list_ids": ids,
        "list_values": values,
        "masks": integer(-(2**31), 2**31, (2, -(-vocab // 32))).int(),
        "out": torch.empty(positions, dtype=torch.int64),
    }
    placed = {name: value.to(device) for name, value in arguments.items()}
    return Call(
        arguments={**placed, "workspace": shape.workspace(positions, device)},
        outputs=("out", "logits", "counts"),
        updated=("logits", "counts"),
        exact=("out", "counts"),
    )


def _work(
    shape: SampleShape, requests: Sequence[Request], random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`work`, and the biases that it refers to."""
    rows: list[tuple[int, ...]] = []
    ids = [torch.zeros(0, dtype=torch.int32)]
    slot = begin = 0
    for at, one in enumerate(requests):
        own = slot if one.penalised else -1
        rows.append((at, 3 * at, one.flags, own, begin, begin + one.biases, at % 2 if one.masked else -1))
        ids.append(torch.randperm(shape.vocab, generator=random)[: one.biases].int())
        slot, begin = slot + one.penalised, begin + one.biases
    values = torch.randn(begin, generator=random) * 4
    values[::3] = float("-inf")
    return torch.tensor(rows, dtype=torch.int64).view(-1, 7), torch.cat(ids), values


def cases() -> Sequence[Case[SampleShape]]:
    """Small: one split and several, a vocabulary with and without remainder, more candidates than there is room for."""
    mixed = (GREEDY, EVERYTHING, PLAIN, TOP_P, Request(penalised=True, masked=True))
    small = [
        ("nothing", 60, (), 3.0),
        ("greedy", 60, (GREEDY, Request(penalised=True), Request(biases=20), Request(masked=True)), 3.0),
        ("plain", 9000, (PLAIN, Request(temperature=1e-5)), 3.0),
        ("truncated", 301, (TOP_K, TOP_P, MIN_P), 3.0),
        ("large", 9000, (TOP_P, EVERYTHING), 3.0),
        ("mixed", 1000, mixed, 3.0),
        ("flat", 5000, (TOP_P,), 0.01),
    ]
    usual = Request(temperature=0.8, top_k=50, top_p=0.95)
    large = [
        ("topk-topp", usual, 1), ("topk-topp", usual, 64), ("topk-topp", usual, 256),
        ("greedy", GREEDY, 64), ("plain", PLAIN, 64), ("topp", TOP_P, 64), ("everything", EVERYTHING, 64),
    ]  # fmt: skip
    found = [_case(name, vocab, requests, spread) for name, vocab, requests, spread in small]
    return found + [_case(name, 128256, (request,) * batch, 3.0, bench=True) for name, request, batch in large]


def _case(
    name: str, vocab: int, requests: Sequence[Request], spread: float, *, bench: bool = False
) -> Case[SampleShape]:  # fmt: skip
    """The goal is a time: four reads of the logits and 10 us, at the H200's speed, as a fraction of one read."""
    shape = SampleShape(vocab=vocab)
    traffic = model(shape, requests)
    floor_s = traffic.bytes / H200_BYTES_PER_S
    return Case(
        name=f"{name}-{shape.label}-s{len(requests)}{'-4reads+10us' * bench}",
        shape=shape,
        make=partial(_call, shape, requests, spread),
        traffic=traffic,
        bench=bench,
        goal=round(floor_s / (4 * floor_s + FIXED_S), 4) if bench else None,
    )
