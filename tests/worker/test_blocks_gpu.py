"""KV blocks on a real GPU: bytes and digests of the reference, beside a busy engine stream, from several threads."""

import threading

import pytest
import torch
from support.kv_world import LAYOUT

from baton_common.ids import PageId
from baton_engine.exec.device import open_device
from baton_engine.exec.pool import KvPool
from baton_kernels.pages import Part, payload_digest
from baton_kvtransfer.blocks import MULTILINEAR, Seal
from baton_kvtransfer.plan import Block
from baton_worker.blocks import blocks_for

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
