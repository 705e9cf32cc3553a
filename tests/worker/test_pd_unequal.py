"""Prefill and decode as real processes whose KV pools differ: page sizes, dtypes. The tokens stay what they should be.

A small client plays the router. Weights are random and float32. With KV of equal dtype the tokens are those of
`transformers`; where one side keeps bfloat16, each token is as good as the best one, as far as that dtype can tell.
All processes compute on the CPU; with a GPU (`-m gpu`) the side that keeps float32 is on that one. The other cannot be:
attention on a GPU reads KV of the dtype that it computes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.checkpoints import tiny_checkpoint
from support.pd import VOCAB, connected, ids, no_page_is_held, prompts, side_by_side, status
from support.processes import RouterProcess, Service, WorkerProcess
from support.reference import Reference

from baton_engine.request import SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

OUTPUTS = 8
ODD_CHUNKS = {"step_tokens": 41, "max_rows": 16}  # prompts are cut at odd places
SMALL_SLOTS = {"slot_bytes": 8192, "slots_per_peer": 3}  # so that a prompt takes many chunks
SEQUENCE = [(7 * index + 11) % VOCAB for index in range(148)]
BF16_LOGITS = 0.1
"""How far below the best a token may be, where its KV was rounded to 8 bits of mantissa; a wrong page costs above 1."""
HEADS_INSIDE = """
import sys
from dataclasses import replace
from baton_engine.models.spec import ModelSpec
from baton_kvtransfer import AxisOrder
layout = ModelSpec.layout
order = AxisOrder.LAYER_PAGE_KV_TOKEN_HEAD_DIM
ModelSpec.layout = lambda *arguments: replace(layout(*arguments), order=order)
from baton_prefill.main import main
sys.exit(main())
"""
"""A prefill worker whose pool has another order of axes; there is no setting for it."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(params=("cpu", pytest.param("gpu", marks=pytest.mark.gpu)))
def device(request: pytest.FixtureRequest) -> str:
    return "cpu" if request.param == "cpu" else str(request.getfixturevalue("gpu_device"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@contextmanager
def pair_of(checkpoint: Path, folder: Path, *, prefill: dict[str, Any], decode: dict[str, Any]) -> Iterator[Service]:
    """One worker of each role, with settings of its own."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(WorkerProcess(role, checkpoint, folder, **{**ODD_CHUNKS, **SMALL_SLOTS, **settings}))
            for role, settings in (("prefill", prefill), ("decode", decode))
        ]
        for worker in workers:
            worker.wait_ready()
        yield Service(prefill=(workers[0],), decode=(workers[1],), colocated=(), router=None)


@pytest.mark.parametrize(("prefill", "decode", "wire"), [(16, 64, "shm"), (64, 16, "tcp")])
async def test_unequal_pages_change_no_token(
    checkpoint: Path, reference: Reference, tmp_path: Path, prefill: int, decode: int, wire: str
) -> None:
    ours, theirs = ({"page_tokens": size, "wire": wire} for size in (prefill, decode))
    with pair_of(checkpoint, tmp_path, prefill=ours, decode=theirs) as service:
        questions = [(prompt, GREEDY) for prompt in prompts(40, seed=prefill)]
        async with connected(service) as pair:
            answers = ids(await side_by_side(questions, pair.ask))
            known, longer = SEQUENCE[:88], SEQUENCE
            await pair.ask(known, GREEDY)
            started, reserved = await pair.begin(longer, GREEDY)
            first_missing = (await reserved.ticket).first_missing_token
            continued = [(await started.first()).token_id, *await reserved.end()]
        for (prompt, _), answer in zip(questions, answers, strict=True):
            assert reference.is_greedy(prompt, answer), prompt
        assert first_missing == 88 // decode * decode, "what decode has in its own pages is not sent again"
        assert reference.is_greedy(longer, continued)
        for process in service.workers:
            await no_page_is_held(process)
        assert (await status(service.prefill[0])).load.handoffs >= 40


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"kv_dtype": "float32", "page_tokens": 64, "code": HEADS_INSIDE}, {"kv_dtype": "bfloat16", "page_tokens": 16}),
        ({"kv_dtype": "bfloat16"}, {"kv_dtype": "float32"}),
    ],
    ids=["narrower-page-order", "wider"],
)
async def test_unequal_dtypes_cost_no_more_than_the_narrower_one(
    checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    device: str,
    prefill: dict[str, Any],
    decode: dict[str, Any],
) -> None:
    ours, theirs = (side | {"device": device} if side["kv_dtype"] == "float32" else side for side in (prefill, decode))
    with pair_of(checkpoint, tmp_path, prefill=ours, decode=theirs) as service:
        questions = [(prompt, GREEDY) for prompt in prompts(40, seed=11)]
        async with connected(service) as pair:
            answers = ids(await side_by_side(questions, pair.ask))
            orders = {client.hello.compat.layout for client in (pair.prefill, pair.decode)}
        assert len(orders) == (2 if "code" in prefill else 1)
        sent = (await status(service.prefill[0])).peers[0].bytes
    behind = [reference.regret(prompt, answer) for (prompt, _), answer in zip(questions, answers, strict=True)]
    assert max(behind) < BF16_LOGITS
    tokens = sum(len(prompt) for prompt, _ in questions)
    position = 2 * 3 * 2 * 16  # keys and values, layers, heads, dim of the checkpoint
    assert 0 < sent <= tokens * position * 2, "payloads are bfloat16, whichever side keeps it"


async def test_a_router_pairs_unequal_workers(checkpoint: Path, tmp_path: Path) -> None:
    settings = ({"page_tokens": 64, "kv_dtype": "bfloat16"}, {"page_tokens": 16})
    with (
        pair_of(checkpoint, tmp_path, prefill=settings[0], decode=settings[1]) as service,
        RouterProcess(checkpoint, tmp_path, workers=[worker.address for worker in service.workers]) as router,
    ):
        router.wait_ready().wait_workers(2)
        body = {"model": checkpoint.name, "prompt": "a prompt of some pages " * 20, "max_tokens": OUTPUTS}
        async with httpx.AsyncClient(base_url=router.url, timeout=60) as client:
            assert (await client.get("/ready")).json()["ready"]
            answer = await client.post("/v1/completions", json=body | {"ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == OUTPUTS, answer.text
        assert (await status(service.prefill[0])).load.handoffs == 1
