"""KV blocks of a GPU's pool: the same bytes as on a host in every dtype, one lane a call, whole handoffs, its digest.

The GPU is one whose memory is the host's. Its kernel's reference runs; under TRITON_INTERPRET=1, for the tests marked
`either`, the kernel itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import permutations, product
from math import inf, nan
from random import Random
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.kv_ranks import CANARY as RANK_CANARY
from support.kv_ranks import TOKENS, Sides, layout_of
from support.kv_world import LAYOUT, World, no_kv_threads

from baton_common.clock import SystemClock
from baton_common.ids import PageId
from baton_engine.exec.cuda import Patience
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import TORCH_DTYPES, KvPool
from baton_kernels.capabilities import CPU, named
from baton_kernels.library import Library
from baton_kernels.pages import Part, payload_digest
from baton_kernels.rt.language import INTERPRETED
from baton_kvtransfer import AxisOrder, PageLayout, Receipt, TransferConfig
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, Blocks, HostBlocks, Seal, agreed_payload
from baton_kvtransfer.errors import DeadlineExceeded
from baton_kvtransfer.layout import DTYPE_BYTES
from baton_kvtransfer.plan import Block
from baton_kvtransfer.routes import routes
from baton_kvtransfer.wires.chaos import Faults
from baton_proto.compat import CONVERTED
from baton_worker import blocks as under_test
from baton_worker.blocks import PLAIN, DeviceBlocks, blocks_for

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


# ---- other dtypes ---------------------------------------------------------------------------------------------------
CONVERSIONS = pytest.mark.parametrize(("dtype", "payload"), list(permutations(PLAIN, 2)))
POOLS = pytest.mark.parametrize(
    ("dim", "order"),
    [pytest.param(16, order, marks=either if index == 0 else ()) for index, order in enumerate(AxisOrder)]
    + [(5, AxisOrder.PAGE_LAYER_KV_TOKEN_HEAD_DIM)],
)


@CONVERSIONS
@POOLS
def test_what_it_sends_as_another_dtype_is_what_a_host_sends(
    dtype: str, payload: str, dim: int, order: AxisOrder
) -> None:
    layout, travels = layouts(dtype, payload, dim, order)
    pool = edges_of(layout)
    host, device = HostBlocks(pool, layout).for_payloads(payload), device_blocks(pool).for_payloads(payload)
    wanted, got = payload_of(travels), payload_of(travels)
    digest = host.gather(BLOCK, PAGES, wanted, Seal(XXH3, 3))
    assert device.gather(BLOCK, PAGES, got, Seal(XXH3, 3)) == digest
    assert got == wanted
    assert device.gather(BLOCK, PAGES, got, Seal(MULTILINEAR, 3)) == summed(got, travels), "of what travels"


@CONVERSIONS
@POOLS
def test_what_it_keeps_of_another_dtype_is_what_a_host_keeps(
    dtype: str, payload: str, dim: int, order: AxisOrder
) -> None:
    layout, travels = layouts(dtype, payload, dim, order)
    sent = payload_of(travels)
    digest = HostBlocks(edges_of(travels), travels).gather(BLOCK, PAGES, sent, Seal(XXH3, 3))
    digests = {XXH3: digest, MULTILINEAR: summed(sent, travels)}
    theirs = torch.full_like(pool_of(layout), 99.0)
    host = HostBlocks(theirs, layout).for_payloads(payload)
    assert host.scatter(BLOCK, PAGES, sent, Seal(XXH3, 3), digest=digest, shared=False)
    for kind, wanted in digests.items():
        ours = torch.full_like(theirs, 99.0)
        device = device_blocks(ours).for_payloads(payload)
        assert device.scatter(BLOCK, PAGES, sent, Seal(kind, 3), digest=wanted, shared=True)
        assert torch.equal(bits(ours), bits(theirs))
        sent[-3] ^= 1
        assert not device.scatter(BLOCK, PAGES, sent, Seal(kind, 3), digest=wanted, shared=True)
        sent[-3] ^= 1


@CONVERSIONS
def test_what_is_no_number_stays_none(dtype: str, payload: str) -> None:
    """Which of its bit patterns it gets is nobody's promise."""
    layout, travels = layouts(dtype, payload)
    pool, target, sent = torch.full_like(pool_of(layout), nan), torch.zeros_like(pool_of(layout)), payload_of(travels)
    seal = Seal(MULTILINEAR, 3)
    digest = device_blocks(pool).for_payloads(payload).gather(BLOCK, PAGES, sent, seal)
    assert bool(torch.frombuffer(sent, dtype=getattr(torch, payload)).isnan().all())
    blocks = device_blocks(target).for_payloads(payload)
    assert blocks.scatter(BLOCK, PAGES, sent, seal, digest=digest, shared=True)
    assert bool(target[PAGES[1], 1:3].isnan().all())


def test_the_dtype_of_the_pool_is_the_first_and_all_share_the_lanes() -> None:
    cuda = FakeCuda(reached=None)
    pool = pool_of(LAYOUT)
    blocks, seal = device_blocks(pool, cuda), Seal(XXH3, 0)
    assert blocks.payloads == ("bfloat16", "float32", "float16")
    before, sizes = len(cuda.pins), []
    for dtype in blocks.payloads:
        payload = payload_of(replace(LAYOUT, dtype=dtype))
        blocks.for_payloads(dtype).gather(BLOCK, PAGES, payload, seal)
        sizes.append(len(payload))
    blocks.gather(BLOCK, PAGES, payload_of(), seal)
    assert cuda.marks == 4
    assert len(cuda.pins) == before + len(set(sizes)), "staging grew, and was kept"


@pytest.mark.parametrize(("sender", "receiver"), list(product(TORCH_DTYPES, repeat=2)))
def test_what_the_router_pairs_agrees_on_a_payload(sender: str, receiver: str) -> None:
    """It does not look at the KV dtype, so pools of all that a worker can keep must fit, wherever they lie."""
    assert "kv_dtype" in CONVERTED
    kept = {dtype: replace(LAYOUT, dtype=dtype) for dtype in (sender, receiver)}
    sides: dict[str, list[Blocks]] = {
        dtype: [HostBlocks(pool_of(layout), layout), device_blocks(pool_of(layout))] for dtype, layout in kept.items()
    }
    narrower = min(receiver, sender, key=DTYPE_BYTES.__getitem__)
    for theirs, ours in product(sides[sender], sides[receiver]):
        assert agreed_payload(sender=theirs.payloads, receiver=ours.payloads) == narrower


def test_integers_are_not_converted_and_scales_are_not_left_behind() -> None:
    layout = replace(LAYOUT, dtype="int8")
    assert device_blocks(pool_of(layout)).payloads == HostBlocks(pool_of(layout), layout).payloads == ("int8",)
    with pytest.raises(ValueError, match="set kv_dtype to bfloat16"):
        device_blocks(torch.zeros(LAYOUT.shape(2), dtype=torch.uint8).view(torch.float8_e4m3fn))


def layouts(dtype: str, payload: str, dim: int = 16, order: AxisOrder = LAYOUT.order) -> tuple[PageLayout, PageLayout]:
    """Of a pool, and the same with the dtype of payloads."""
    layout = PageLayout(layers=4, kv=2, heads=2, page_tokens=16, dim=dim, dtype=dtype, order=order)
    return layout, replace(layout, dtype=payload)


def edges_of(layout: PageLayout) -> torch.Tensor:
    """A pool of numbers that round up, down and to even, saturate, overflow and underflow."""
    pool = pool_of(layout)
    edges = torch.tensor(
        [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -65520.0, 3.4e38, 3e-8, -1e-7, inf,
         -inf, 3.0 if INTERPRETED else -1e-40]  # the interpreter flushes subnormals of bfloat16
    )  # fmt: skip
    values = torch.where(torch.rand(pool.shape) < 0.3, edges[torch.randint(len(edges), pool.shape)], 0.0)
    return pool.copy_(torch.where(values == 0, torch.randn(pool.shape) * 1e3, values))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def summed(payload: memoryview, layout: PageLayout) -> int:
    """The MULTILINEAR digest by its specification."""
    part = Part(
        layers=(BLOCK.layer_begin, BLOCK.layer_end), heads=(BLOCK.head_begin, BLOCK.head_end),
        tokens=(BLOCK.token_begin, BLOCK.token_end),
    )  # fmt: skip
    rows = torch.frombuffer(payload, dtype=torch.uint8).view(*BLOCK.shape(layout)[:4], -1)
    return Seal(MULTILINEAR, 3).around(payload_digest(rows.numpy(), part))


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


@pytest.mark.parametrize(
    ("source", "target", "gpus"),
    [
        *((source, target, gpu) for source, target in permutations(PLAIN, 2) for gpu in ("source", "target")),
        pytest.param("float32", "bfloat16", "source target", marks=either),
        pytest.param("bfloat16", "float32", "source target", marks=either),
        *((*pair, "source target") for pair in permutations(PLAIN, 2) if "float16" in pair),
    ],
)
def test_kv_crosses_between_gpus_that_keep_other_dtypes(source: str, target: str, gpus: str) -> None:
    """Pages and axes differ too. The narrower dtype travels; of two that are equally wide the receiver's."""
    ours = layout_of(dtype=source)
    theirs = layout_of(dtype=target, page_tokens=40, order=AxisOrder.LAYER_PAGE_KV_TOKEN_HEAD_DIM)
    blocks: dict[str, Any] = {f"{side}_blocks": device_blocks for side in gpus.split()}
    with closing(Sides("shm", heads=4, source=ours, target=theirs, **blocks)) as world:
        sending = world.start(
            routes(heads=4, source_ranks=1, target_ranks=1, latent=False, number=0, first_token=61, end_token=TOKENS)
        )
        sending.run()
        (receipt,) = sending.sent.values()
        assert isinstance(receipt, Receipt)
        assert receipt.bytes == world.truth[61:].numel() * min(DTYPE_BYTES[source], DTYPE_BYTES[target])
        held, arrived = world.sources[0].holds(61), world.targets[0].holds()
        assert torch.equal(arrived[61:], held.to(getattr(torch, target)).float())
        assert bool((arrived[:61] == RANK_CANARY).all()), "wrote outside its range"
        kinds = {link._digest for side in (*world.sources, *world.targets) for link in side.endpoint._links}
        assert kinds == {MULTILINEAR if " " in gpus else XXH3}
    assert no_kv_threads()


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
