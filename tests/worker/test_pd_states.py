"""Real workers killed in every state of the handoff: the other one answers, gets its pages back, and goes on.

A worker under test dies by its own hand the moment a transfer reaches the state; started again under its name, it is an
ordinary one. Where a handoff is given up, another one and an answer of decode alone are under way beside it.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.pd import VOCAB, Pair, arrived_bytes, connected, no_page_is_held, until
from support.pd_victim import Trap, victims
from support.processes import Service, WorkerProcess
from support.router_client import Answer

from baton_common.errors import ErrorKind
from baton_engine.request import Mode, SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
PROMPT_TOKENS = 600
PROMPT_BYTES = PROMPT_TOKENS * 3 * 2 * 2 * 16 * 4
"""Of KV: layers, K and V, heads, head size, float32."""
LIMIT_S = 60.0
SETTINGS = {"step_tokens": 64, "max_rows": 8, "pages": 512}
SENDER = ("queued", "prefilling", "sending", "sent", "released")
RECEIVER = ("expected", "new", "reserved", "receiving", "verified", "committed")
GIVEN_UP_BY_SENDER = [("aborting", "prefill"), ("aborting", "deadline"), ("aborting>drained", "prefill"),
                      ("prefilling>drained", "decode")]  # fmt: skip
GIVEN_UP_BY_RECEIVER = [("aborting", "decode"), ("aborting>drained", "decode"), ("receiving>drained", "prefill")]
DEADLINE_S = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    checkpoint = tiny_checkpoint("llama", folder / "model", seed=7, max_position_embeddings=2048)
    with victims(folder, checkpoint, **SETTINGS) as service:
        yield service


def prompt(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(VOCAB) for _ in range(PROMPT_TOKENS)]


async def alone(pair: Pair, seed: int, sampling: SamplingParams = GREEDY) -> list[int]:
    """What decode answers without any page of others."""
    return await (
        await pair.decode.submit(Mode.LOCAL, prompt(seed), sampling=sampling, raw={"cache_salt": "alone"})
    ).end()


async def works_again(service: Service, worker: WorkerProcess, seed: int) -> None:
    worker.start().wait_ready()
    async with connected(service) as pair:
        assert [token.token_id for token in await pair.ask(prompt(seed), GREEDY)] == await alone(pair, seed)
    for process in service.workers:
        await no_page_is_held(process)


async def died(worker: WorkerProcess) -> None:
    assert await asyncio.to_thread(worker.wait, LIMIT_S) == -signal.SIGKILL


async def over(answer: Answer) -> ErrorKind | None:
    await asyncio.wait_for(answer.over, LIMIT_S)
    return None if answer.error is None else answer.error.kind


async def both(pair: Pair, seed: int, deadline_s: float = LIMIT_S) -> tuple[Answer, Answer]:
    """What P and what D will answer. `deadline_s`: of P."""
    reserved = await pair.decode.submit(Mode.RESERVE, prompt(seed), sampling=GREEDY)
    ticket = await reserved.ticket
    started = await pair.prefill.submit(
        Mode.PREFILL, prompt(seed), sampling=GREEDY, ticket=ticket, deadline_s=deadline_s
    )
    return started, reserved


async def two_under_way(service: Service, pair: Pair, seed: int, by: str) -> list[tuple[Answer, Answer]]:
    """Of the first part of the KV is at decode, of the second all; neither ends by itself while P is endless."""
    decode = service.decode[0]
    at_first = await arrived_bytes(decode)
    second = await both(pair, seed + 1000)

    async def came(more_than: int) -> bool:
        return await arrived_bytes(decode) > at_first + more_than

    await until(lambda: came(PROMPT_BYTES - 1), LIMIT_S)
    first = await both(pair, seed, DEADLINE_S if by == "deadline" else LIMIT_S)
    if by != "deadline":
        await until(lambda: came(PROMPT_BYTES), LIMIT_S)
    return [first, second]


# ---- on the way -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", SENDER)
async def test_prefill_dies(service: Service, folder: Path, state: str) -> None:
    prefill, decode, seed = service.prefill[0], service.decode[0], SENDER.index(state)
    async with connected(service) as pair:
        Trap(folder, "prefill").set("die", state)
        _, reserved = await both(pair, seed)
        await died(prefill)
        if state == "queued":  # decode never heard of it; the router ends what it began
            await pair.decode.abort(reserved)
        error = await over(reserved)
        if state == "released":  # all is there
            assert (error, reserved.token_ids) == (None, (await alone(pair, seed))[1:])
        else:
            assert error is (ErrorKind.ABORTED if state == "queued" else ErrorKind.TRANSFER)
        await no_page_is_held(decode)
    await works_again(service, prefill, 100 + seed)


@pytest.mark.parametrize("state", RECEIVER)
async def test_decode_dies(service: Service, folder: Path, state: str) -> None:
    prefill, decode, seed = service.prefill[0], service.decode[0], 10 + RECEIVER.index(state)
    async with connected(service) as pair:
        Trap(folder, "decode").set("die", state)
        if state == "expected":  # no ticket leaves: prefill never hears of it
            reserved = await pair.decode.submit(Mode.RESERVE, prompt(seed), sampling=GREEDY)
            await died(decode)
            with pytest.raises(ConnectionError):
                await reserved.ticket
        else:
            started, _ = await both(pair, seed)
            await died(decode)
            assert await over(started) is ErrorKind.TRANSFER
        await no_page_is_held(prefill)
    await works_again(service, decode, 100 + seed)


# ---- given up -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("state", "by"), GIVEN_UP_BY_SENDER)
async def test_prefill_dies_when_a_handoff_was_given_up(service: Service, folder: Path, state: str, by: str) -> None:
    prefill, decode, seed = service.prefill[0], service.decode[0], 20 + GIVEN_UP_BY_SENDER.index((state, by))
    trap = Trap(folder, "prefill")
    trap.set("die", state)
    async with connected(service) as pair:
        with trap.endless():
            (started, reserved), (_, beside) = await two_under_way(service, pair, seed, by)
            answer = await pair.decode.submit(Mode.LOCAL, prompt(seed), sampling=LONG, raw={"cache_salt": "beside"})
            if by == "prefill":
                await pair.prefill.abort(started)
            elif by == "decode":
                await pair.decode.abort(reserved)
            await died(prefill)
        assert await over(reserved) is (ErrorKind.ABORTED if by == "decode" else ErrorKind.TRANSFER)
        assert await over(beside) is ErrorKind.TRANSFER
        assert await answer.end() == await alone(pair, seed, LONG)
        await no_page_is_held(decode)
    await works_again(service, prefill, 100 + seed)


@pytest.mark.parametrize(("state", "by"), GIVEN_UP_BY_RECEIVER)
async def test_decode_dies_when_a_handoff_was_given_up(service: Service, folder: Path, state: str, by: str) -> None:
    prefill, decode, seed = service.prefill[0], service.decode[0], 30 + GIVEN_UP_BY_RECEIVER.index((state, by))
    Trap(folder, "decode").set("die", state)
    async with connected(service) as pair:
        with Trap(folder, "prefill").endless():
            (started, reserved), (beside, _) = await two_under_way(service, pair, seed, by)
            if by == "prefill":
                await pair.prefill.abort(started)
            else:
                await pair.decode.abort(reserved)
            await died(decode)
        assert await over(started) is (ErrorKind.ABORTED if by == "prefill" else ErrorKind.TRANSFER)
        assert await over(beside) is ErrorKind.TRANSFER
        await no_page_is_held(prefill)
    await works_again(service, decode, 100 + seed)
