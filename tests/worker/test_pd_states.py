"""Real workers killed in every state of the handoff: the other one answers, gets its pages back, and goes on.

A worker under test dies by its own hand the moment a transfer reaches the state that a file names, so that each state
is really reached; started again, it is an ordinary one until the file says so.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.pd import VOCAB, Pair, connected, no_page_is_held
from support.processes import Service, WorkerProcess
from support.router_client import Answer

from baton_common.errors import ErrorKind
from baton_engine.request import Mode, SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT_TOKENS = 600
LIMIT_S = 60.0
SETTINGS = {"step_tokens": 64, "max_rows": 8, "pages": 512}
SENDER, RECEIVER = ("queued", "prefilling", "sending", "sent"), ("reserved", "receiving", "verified", "committed")

DIES = """
import os, signal
from pathlib import Path
from baton_kvtransfer.{record} import {name}
from baton_{role}.main import main

deadly = Path({path!r})

def look(state):
    if deadly.exists() and deadly.read_text() == state:
        deadly.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

advance, made = {name}.advance, {name}.__init__

def step(self, to):
    advance(self, to)
    look(to.value)

def begin(self, *arguments, **more):
    made(self, *arguments, **more)
    look(self.state.value)

{name}.advance, {name}.__init__ = step, begin
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    checkpoint = tiny_checkpoint("llama", folder / "model", seed=7, max_position_embeddings=2048)
    records = {"prefill": ("outgoing", "Outgoing"), "decode": ("incoming", "Incoming")}
    workers = []
    for role, (record, name) in records.items():
        code = DIES.format(record=record, name=name, role=role, path=str(folder / f"{role}.dies"))
        workers.append(WorkerProcess(role, checkpoint, folder, code=code, **SETTINGS))
    prefill, decode = workers
    with prefill, decode:
        for worker in workers:
            worker.wait_ready()
        yield Service(prefill=(prefill,), decode=(decode,), colocated=(), router=None)


def prompt(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(VOCAB) for _ in range(PROMPT_TOKENS)]


async def pair_works(service: Service, seed: int) -> None:
    async with connected(service) as pair:
        tokens = [token.token_id for token in await pair.ask(prompt(seed), GREEDY)]
        alone = await pair.decode.submit(Mode.LOCAL, prompt(seed), sampling=GREEDY, raw={"cache_salt": "alone"})
        assert await alone.end() == tokens


async def over(answer: Answer) -> None:
    await asyncio.wait_for(answer.over, LIMIT_S)


async def both(pair: Pair, seed: int) -> tuple[Answer, Answer]:
    reserved = await pair.decode.submit(Mode.RESERVE, prompt(seed), sampling=GREEDY)
    ticket = await reserved.ticket
    return await pair.prefill.submit(Mode.PREFILL, prompt(seed), sampling=GREEDY, ticket=ticket), reserved


@pytest.mark.parametrize("state", SENDER)
async def test_prefill_dies(service: Service, folder: Path, state: str) -> None:
    prefill, decode = service.prefill[0], service.decode[0]
    async with connected(service) as pair:
        (folder / "prefill.dies").write_text(state)
        _, reserved = await both(pair, SENDER.index(state))
        assert await asyncio.to_thread(prefill.wait, LIMIT_S) == -signal.SIGKILL
        if state == "queued":  # decode never heard of it; the router ends what it began
            await pair.decode.abort(reserved)
        await over(reserved)
        assert reserved.error is not None
        assert reserved.error.kind is (ErrorKind.ABORTED if state == "queued" else ErrorKind.TRANSFER)
        await no_page_is_held(decode)
    prefill.start().wait_ready()
    await pair_works(service, 100 + SENDER.index(state))


@pytest.mark.parametrize("state", RECEIVER)
async def test_decode_dies(service: Service, folder: Path, state: str) -> None:
    prefill, decode = service.prefill[0], service.decode[0]
    async with connected(service) as pair:
        (folder / "decode.dies").write_text(state)
        started, _ = await both(pair, 10 + RECEIVER.index(state))
        assert await asyncio.to_thread(decode.wait, LIMIT_S) == -signal.SIGKILL
        await over(started)
        assert started.error is not None
        assert started.error.kind.retriable
        await no_page_is_held(prefill)
    decode.start().wait_ready()
    await pair_works(service, 200 + RECEIVER.index(state))
