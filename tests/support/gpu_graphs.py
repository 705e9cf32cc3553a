"""Whether an operation may be captured in a graph: it neither allocates nor waits, and a replay computes what a plain
call computes."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from support.kernel_cases import poison


class Allocations:
    """How often torch's allocator was asked for memory of this device."""

    def __init__(self, device):
        self._device = device

    def __call__(self):
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_stats(self._device)["allocation.all.allocated"]


@contextmanager
def waiting_forbidden(device):
    """An operation that synchronises with the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_capture(operation, call, gpu, allocations):
    """Run `call`, then record it with `gpu` and replay it twice, always from equal beginnings. AssertionError."""
    outputs = {name: call.arguments[name] for name in call.outputs}
    beginning = {name: tensor.clone() for name, tensor in outputs.items()}
    run = partial(operation, **call.arguments)
    run()  # plans and workspaces are made once
    begin(outputs, beginning, call)
    before = allocations()
    with waiting_forbidden(gpu.torch_device):
        run()
    assert allocations() == before, "the operation allocates"
    expected = {name: tensor.clone() for name, tensor in outputs.items()}
    replay = gpu.record([run])
    for _ in range(2):
        begin(outputs, beginning, call)
        replay()
        for name, tensor in outputs.items():
            assert same_bytes(tensor, expected[name]), f"{name}: a replay is not what a plain call computes"


def begin(outputs, beginning, call):
    """As before the first call; what is only written is poisoned."""
    for name, tensor in outputs.items():
        tensor.copy_(beginning[name])
        poison(tensor, call, name, before=beginning[name])


def same_bytes(first, second):
    """NaN equals NaN."""
    if not first.numel():
        return True
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
