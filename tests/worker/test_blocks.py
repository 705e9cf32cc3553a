"""KV blocks of a GPU's pool: the same bytes as on a host, one lane a call, and whole handoffs with its digest.

The GPU is one whose memory is the host's. Its kernel's reference runs; under TRITON_INTERPRET=1, for the tests marked
`either`, the kernel itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from random import Random

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.kv_world import LAYOUT, World, no_kv_threads

from baton_common.clock import SystemClock
from baton_common.ids import PageId
from baton_engine.exec.cuda import Patience
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_kernels.capabilities import CPU, named
from baton_kernels.library import Library
from baton_kernels.rt.language import INTERPRETED
from baton_kvtransfer import AxisOrder, PageLayout, Receipt, TransferConfig
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, HostBlocks, Seal
from baton_kvtransfer.errors import DeadlineExceeded
from baton_kvtransfer.plan import Block
from baton_kvtransfer.wires.chaos import Faults
from baton_worker import blocks as under_test
from baton_worker.blocks import DeviceBlocks, blocks_for

either = pytest.mark.interpret  # and in an ordinary run too
INTERPRETER = threading.RLock()  # Triton's is not made for threads
BLOCK = Block(layer_begin=1, layer_end=3, head_begin=0, head_end=2, token_begin=5, token_end=40)
PAGES = [PageId(page) for page in (6, 0, 3)]


def device_blocks(pool: torch.Tensor, *streams: FakeCuda) -> DeviceBlocks:
    library = Library(named("sm_90"), force={"pages": "triton"}) if INTERPRETED else Library(CPU)
    one = FakeCuda(reached=None, watch=lambda: INTERPRETER)
    return DeviceBlocks(pool, library, streams or [one], Patience(SystemClock()))


def pool_of(layout: PageLayout, pages: int = 8) -> torch.Tensor:
    dtype = getattr(torch, layout.dtype)
    flat = torch.randint(-100, 100, (layout.page_bytes * pages,), dtype=torch.int8).to(dtype)
    return torch.as_strided(flat, layout.shape(pages), layout.strides(pages))


def payload_of(layout: PageLayout = LAYOUT) -> memoryview:
    return memoryview(bytearray(BLOCK.bytes(layout)))


# ---- one block ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", AxisOrder)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        pytest.param("bfloat16", 16, marks=either),
        ("float16", 5),
        ("float32", 4),
        ("int8", 4),
        pytest.param("int8", 6, marks=either),
    ],
)
def test_it_copies_what_a_host_copies(order: AxisOrder, dtype: str, dim: int) -> None:
    layout = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=dim, dtype=dtype, order=order)
    pool, host, device = pool_of(layout), payload_of(layout), payload_of(layout)
    seal = Seal(XXH3, 3)
    digest = HostBlocks(pool, layout).gather(BLOCK, PAGES, host, seal)
    assert device_blocks(pool).gather(BLOCK, PAGES, device, seal) == digest
    assert host == device
    targets = [torch.zeros(layout.page_bytes * 8, dtype=torch.uint8).view(pool.dtype) for _ in range(2)]
    ours, theirs = (target.as_strided(pool.shape, pool.stride()) for target in targets)
    assert HostBlocks(theirs, layout).scatter(BLOCK, PAGES, host, seal, digest=digest, shared=False)
    assert device_blocks(ours).scatter(BLOCK, PAGES, host, seal, digest=digest, shared=False)
    assert torch.equal(targets[0].view(torch.uint8), targets[1].view(torch.uint8))


def test_nothing_is_converted_on_a_gpu() -> None:
    blocks = device_blocks(pool_of(LAYOUT))
    assert blocks.payloads == ("bfloat16",)
    assert blocks.for_payloads("bfloat16") is blocks
    with pytest.raises(ValueError, match="set kv_dtype to bfloat16"):
        device_blocks(torch.zeros(LAYOUT.shape(2), dtype=torch.uint8).view(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("kind", "at"), [(XXH3, 777), (MULTILINEAR, 0), (MULTILINEAR, -1), pytest.param(MULTILINEAR, 777, marks=either)]
)
def test_a_flipped_bit_is_damage(kind: str, at: int) -> None:
    pool, payload, seal = pool_of(LAYOUT), payload_of(), Seal(kind, 3)
    digest = device_blocks(pool).gather(BLOCK, PAGES, payload, seal)
    blocks = device_blocks(torch.zeros_like(pool))
    payload[at] ^= 16
    assert not blocks.scatter(BLOCK, PAGES, payload, seal, digest=digest, shared=False)
    payload[at] ^= 16
    assert not blocks.scatter(BLOCK, PAGES, payload, Seal(kind, 4), digest=digest, shared=False)
    assert blocks.scatter(BLOCK, PAGES, payload, seal, digest=digest, shared=False)


@either
def test_heads_that_changed_places_are_damage() -> None:
    pool, payload, seal = pool_of(LAYOUT), payload_of(), Seal(MULTILINEAR, 3)
    digest = device_blocks(pool).gather(BLOCK, PAGES, payload, seal)
    shape = BLOCK.shape(LAYOUT)
    swapped = torch.frombuffer(payload, dtype=torch.bfloat16).view(shape).flip(2)
    payload[:] = memoryview(swapped.contiguous().view(torch.uint8).flatten().numpy())
    assert not device_blocks(pool).scatter(BLOCK, PAGES, payload, seal, digest=digest, shared=False)


def test_what_is_written_into_a_slot_after_it_was_read_is_not_stored() -> None:
    """The copy to the device is of memory that no peer reaches."""
    pool, payload, seal = pool_of(LAYOUT), payload_of(), Seal(MULTILINEAR, 3)
    digest = device_blocks(pool).gather(BLOCK, PAGES, payload, seal)
    sent = bytes(payload)

    class Late(FakeCuda):
        def mark(self):  # type: ignore[no-untyped-def]
            payload[:] = bytes(len(payload))
            return super().mark()

    target = torch.zeros_like(pool)
    assert device_blocks(target, Late(reached=None)).scatter(BLOCK, PAGES, payload, seal, digest=digest, shared=True)
    stored = payload_of()
    HostBlocks(target, LAYOUT).gather(BLOCK, PAGES, stored, Seal(XXH3, 0))
    assert stored == sent


# ---- lanes ----------------------------------------------------------------------------------------------------------
def test_staging_is_kept_and_grows_with_what_it_carries() -> None:
    cuda = FakeCuda(reached=None)
    pool = pool_of(LAYOUT)
    blocks, seal = device_blocks(pool, cuda), Seal(MULTILINEAR, 0)
    before = len(cuda.pins)
    for _ in range(3):
        blocks.gather(BLOCK, PAGES, payload_of(), seal)
    assert len(cuda.pins) == before + 1
    assert len(cuda.pins[-1]) >= BLOCK.bytes(LAYOUT)


def test_a_copy_that_hangs_keeps_its_caller_and_its_lane_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "COPY_TIMEOUT_S", 0.02)
    hanging = FakeCuda(reached=0)
    blocks, seal = device_blocks(pool_of(LAYOUT), hanging), Seal(MULTILINEAR, 0)
    returned = threading.Event()

    def gather() -> None:
        blocks.gather(BLOCK, PAGES, payload_of(), seal)
        returned.set()

    caller = threading.Thread(target=gather, daemon=True)
    caller.start()
    while not hanging.marks:
        assert not returned.wait(0.01)
    with pytest.raises(DeadlineExceeded, match="no copy of KV ended"):
        blocks.gather(BLOCK, PAGES, payload_of(), seal)
    assert not returned.is_set()
    hanging.reached = None
    assert returned.wait(10)
    caller.join(10)
    blocks.gather(BLOCK, PAGES, payload_of(), seal)


def test_a_lane_waits_for_its_own_copies_only() -> None:
    slow, fast = FakeCuda(reached=0), FakeCuda(reached=None)
    pool = pool_of(LAYOUT)
    blocks, seal = device_blocks(pool, slow, fast), Seal(MULTILINEAR, 0)
    blocks.gather(BLOCK, PAGES, payload_of(), seal)  # last in, first out: the fast one
    assert (slow.marks, fast.marks) == (0, 1)


def test_threads_share_the_lanes() -> None:
    pool = pool_of(LAYOUT)
    blocks, seal = device_blocks(pool, FakeCuda(reached=None), FakeCuda(reached=None)), Seal(XXH3, 0)
    wanted = payload_of()
    HostBlocks(pool, LAYOUT).gather(BLOCK, PAGES, wanted, seal)
    got = [payload_of() for _ in range(6)]

    def gather(index: int) -> None:
        blocks.gather(BLOCK, PAGES, got[index], seal)

    threads = [threading.Thread(target=gather, args=(index,)) for index in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == wanted for one in got)


def test_a_pool_in_host_memory_needs_no_blocks_of_its_own() -> None:
    device = open_device("cpu", threads=1)
    assert blocks_for(device, KvPool(LAYOUT, 2, device)) is None
    device.close()


# ---- whole handoffs -------------------------------------------------------------------------------------------------
CONFIG = TransferConfig(wire="auto", slot_bytes=4096, slots_per_peer=4)


@pytest.fixture(params=["inproc", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param, sender_blocks=device_blocks, receiver_blocks=device_blocks)
    yield made
    made.close()
    assert no_kv_threads()


@pytest.mark.parametrize(("first_token", "end_token"), [(0, 1), pytest.param(5, 60, marks=either), (16, 32), (0, 100)])
def test_kv_crosses_between_two_gpus(world: World, first_token: int, end_token: int) -> None:
    run = world.send(first_token, end_token)
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)
    assert isinstance(run.sent.wait(), Receipt)
    assert {link._digest for side in (world.sender, world.receiver) for link in side.endpoint._links} == {MULTILINEAR}


@pytest.mark.parametrize("gpu", ["sender", "receiver"])
def test_kv_crosses_between_a_gpu_and_a_host(gpu: str) -> None:
    world = World("inproc", **{f"{gpu}_blocks": device_blocks})
    run = world.send(0, 60)
    assert isinstance(run.received.wait(), Receipt)
    world.check_arrived(run)
    assert {link._digest for side in (world.sender, world.receiver) for link in side.endpoint._links} == {XXH3}
    world.close()


@pytest.mark.parametrize("wire", ["inproc", pytest.param("shm", marks=either), "tcp"])
def test_every_flipped_bit_is_caught(wire: str) -> None:
    faults = Faults(random=Random(5), flip=0.3)
    world = World(wire, faults=faults, sender_blocks=device_blocks, receiver_blocks=device_blocks)
    runs = [world.send(0, 40) for _ in range(1 if INTERPRETED else 3)]
    for run in runs:
        if isinstance(run.received.wait(), Receipt):
            world.check_arrived(run)
        run.sent.wait()
    assert faults.done["flip"] > 0
    assert world.receiver.metric("digest_failures_total") == faults.done["flip"]
    world.close()
