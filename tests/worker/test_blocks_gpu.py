"""KV blocks on a real GPU: bytes and digests of the reference, beside a busy engine stream, from several threads; and
other dtypes as a host makes them.
"""

import threading
from dataclasses import replace
from itertools import permutations
from math import inf

import pytest
import torch
from support.kv_world import LAYOUT

from baton_common.ids import PageId
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_kernels.pages import Part, payload_digest
from baton_kvtransfer.blocks import MULTILINEAR, XXH3, HostBlocks, Seal
from baton_kvtransfer.plan import Block
from baton_worker.blocks import PLAIN, blocks_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to this process"),
]
BLOCK = Block(layer_begin=1, layer_end=3, head_begin=0, head_end=2, token_begin=5, token_end=40)
PART = Part(layers=(1, 3), heads=(0, 2), tokens=(5, 40))
SEAL = Seal(MULTILINEAR, 3)


def test_blocks_cross_a_gpu_unchanged_while_the_engine_works():
    device = open_device("cuda")
    pool = KvPool(LAYOUT, 64, device)
    device.run(lambda: pool.tensor.normal_())
    blocks = blocks_for(device, pool)
    tables = [[PageId(8 * index + page) for page in (6, 0, 3)] for index in range(8)]
    problems = []

    def cross(source, target):
        for _ in range(5):
            payload = memoryview(bytearray(BLOCK.bytes(LAYOUT)))
            digest = blocks.gather(BLOCK, source, payload, SEAL)
            words = torch.frombuffer(payload, dtype=torch.int16).view(BLOCK.shape(LAYOUT)).numpy()
            if digest != SEAL.around(payload_digest(words, PART)):
                problems.append("digest")
            if not blocks.scatter(BLOCK, target, payload, SEAL, digest=digest, shared=True):
                problems.append("damage")
            again = memoryview(bytearray(BLOCK.bytes(LAYOUT)))
            blocks.gather(BLOCK, target, again, SEAL)
            if again != payload:
                problems.append("bytes")
            again[9] ^= 1
            if blocks.scatter(BLOCK, target, again, SEAL, digest=digest, shared=True):
                problems.append("a flipped bit was not seen")

    busy = device.stream.submit(lambda: torch.cuda._sleep(2_000_000_000))
    cross(tables[0], tables[4])
    assert not busy.done(), "copies do not wait for the engine's stream"
    threads = [threading.Thread(target=cross, args=(tables[index], tables[index + 4])) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert busy.wait(30.0)
    device.close()


@pytest.mark.parametrize(("dtype", "payload"), list(permutations(PLAIN, 2)))
def test_other_dtypes_are_made_as_on_a_host(dtype, payload):
    """Bit for bit, subnormals too; of NaN, that it stays NaN."""
    layout, travels = (replace(LAYOUT, dtype=name) for name in (dtype, payload))
    device = open_device("cuda")
    pool, sent = KvPool(layout, 8, device), edges(travels)
    truth = edges(layout)
    device.run(lambda: pool.tensor[:8].copy_(truth))
    ours = blocks_for(device, pool).for_payloads(payload)
    theirs = HostBlocks(truth, layout).for_payloads(payload)
    table = [PageId(page) for page in (6, 0, 3)]

    got, wanted = (memoryview(bytearray(BLOCK.bytes(travels))) for _ in range(2))
    digest = theirs.gather(BLOCK, table, wanted, Seal(XXH3, 3))
    assert ours.gather(BLOCK, table, got, Seal(XXH3, 3)) == digest
    assert got == wanted
    rows = torch.frombuffer(got, dtype=torch.uint8).view(*BLOCK.shape(travels)[:4], -1).numpy()
    assert ours.gather(BLOCK, table, got, SEAL) == SEAL.around(payload_digest(rows, PART))

    digest = HostBlocks(sent, travels).gather(BLOCK, table, got, Seal(XXH3, 3))
    rows = torch.frombuffer(got, dtype=torch.uint8).view(*BLOCK.shape(travels)[:4], -1).numpy()
    summed = SEAL.around(payload_digest(rows, PART))
    assert theirs.scatter(BLOCK, table, got, Seal(XXH3, 3), digest=digest, shared=False)
    assert ours.scatter(BLOCK, table, got, SEAL, digest=summed, shared=True)
    words = torch.int32 if truth.element_size() == 4 else torch.int16
    assert torch.equal(pool.tensor[:8].cpu().view(words), truth.view(words))

    device.run(lambda: pool.tensor.fill_(float("nan")))
    ours.gather(BLOCK, table, got, SEAL)
    assert torch.frombuffer(got, dtype=getattr(torch, payload)).isnan().all()
    device.close()


def edges(layout):
    """A pool of 8 pages in host memory, of numbers that round in every direction."""
    special = torch.tensor(
        [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -65520.0, 3.4e38, 3e-8, -1e-7, inf,
         -inf, -1e-40]
    )  # fmt: skip
    values = torch.randn(layout.shape(8)) * 1e3
    chosen = torch.rand(values.shape) < 0.3
    values[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))]
    return values.to(getattr(torch, layout.dtype))
