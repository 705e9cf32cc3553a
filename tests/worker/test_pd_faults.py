"""Real workers die, hang and leave in the middle of handoffs: every request ends, no page is lost, the rest goes on.

One pair serves all tests; what a test ended is started again for the next one.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.pd import Pair, arrived_bytes, connected, no_page_is_held, until
from support.processes import Service, WorkerProcess, spawn_service
from support.router_client import Answer, RouterClient

from baton_common.errors import ErrorKind
from baton_engine.request import Mode, SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

CONTEXT = 4096
SLOW = {"step_tokens": 24, "max_rows": 8, "pages": 1024, "alive_interval_s": 0.5}  # a long prompt takes many chunks
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SILENCE_LIMIT_S = 4.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model"), seed=3, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def processes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with spawn_service(tmp_path_factory.mktemp("pair"), checkpoint, router=False, **SLOW) as service:
        yield service


@pytest.fixture
def service(processes: Service) -> Service:
    ended = [process for process in processes.workers if process.exit_code is not None]
    for process in ended:
        process.start()
    for process in ended:
        process.wait_ready()
    return processes


def long_prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(320) for _ in range(3000)]


async def begin_transfers(service: Service, pair: Pair, seeds: range) -> tuple[list[Answer], list[Answer]]:
    """Long prompts on their way: what P and what D will answer, once KV has begun to arrive at D."""
    decode = service.decode[0]
    before = await arrived_bytes(decode)
    begun = [await pair.begin(long_prompt(seed), GREEDY) for seed in seeds]

    async def flows() -> bool:
        return await arrived_bytes(decode) > before

    await until(flows, 30)
    return [answers[0] for answers in begun], [answers[1] for answers in begun]


async def fails_soon(answer: Answer) -> None:
    """The one whose KV was on the way: its worker notices by itself."""
    async with asyncio.timeout(SILENCE_LIMIT_S):
        await answer.over
    assert answer.error is not None
    assert answer.error.kind is ErrorKind.TRANSFER


async def all_fail(answers: list[Answer]) -> None:
    await asyncio.wait_for(asyncio.gather(*(answer.over for answer in answers)), 30)
    for answer in answers:
        assert answer.error is not None
        assert answer.error.kind.retriable


async def abort_as_a_router(worker: RouterClient, answers: list[Answer]) -> None:
    """Those whose prefill had not begun: only the router knows that nobody will send their KV."""
    for answer in answers:
        await worker.abort(answer)
    await asyncio.wait_for(asyncio.gather(*(answer.over for answer in answers)), 30)


async def pair_works(service: Service) -> None:
    """The tokens of a handoff equal those that the decode worker computes alone, without any shared page."""
    prompt = long_prompt(99)[:200]
    async with connected(service) as pair:
        tokens = [token.token_id for token in await pair.ask(prompt, GREEDY)]
        alone = await pair.decode.submit(Mode.LOCAL, prompt, sampling=GREEDY, raw={"cache_salt": "alone"})
        assert await alone.end() == tokens


# ---- deaths ---------------------------------------------------------------------------------------------------------
async def test_death_of_prefill_fails_what_was_on_the_way_and_frees_its_pages(service: Service) -> None:
    async with connected(service) as pair:
        _, reserved = await begin_transfers(service, pair, range(3))
        service.prefill[0].kill()
        await fails_soon(reserved[0])
        await abort_as_a_router(pair.decode, reserved[1:])
        await no_page_is_held(service.decode[0])
    service.prefill[0].wait()
    service.prefill[0].start().wait_ready()
    await pair_works(service)


async def test_death_of_decode_fails_the_handoffs_and_frees_the_pages(service: Service) -> None:
    async with connected(service) as pair:
        started, _ = await begin_transfers(service, pair, range(10, 13))
        service.decode[0].kill()
        await fails_soon(started[0])
        await all_fail(started[1:])
        await no_page_is_held(service.prefill[0])
    service.decode[0].wait()
    service.decode[0].start().wait_ready()
    await pair_works(service)


async def test_a_stopped_prefill_is_noticed_and_recovers_when_it_goes_on(service: Service) -> None:
    async with connected(service) as pair:
        started, reserved = await begin_transfers(service, pair, range(20, 23))
        service.prefill[0].stop()
        await fails_soon(reserved[0])
        await abort_as_a_router(pair.decode, reserved[1:])
        await no_page_is_held(service.decode[0])
        service.prefill[0].resume()
        await all_fail(started)
    await no_page_is_held(service.prefill[0])
    await pair_works(service)


async def test_a_stopped_decode_is_noticed_and_recovers_when_it_goes_on(service: Service) -> None:
    async with connected(service) as pair:
        started, reserved = await begin_transfers(service, pair, range(30, 33))
        service.decode[0].stop()
        await fails_soon(started[0])
        await all_fail(started[1:])
        await no_page_is_held(service.prefill[0])
        service.decode[0].resume()
        await asyncio.wait_for(reserved[0].over, 30)
        if reserved[0].error is not None:  # else all of its KV was there already, though nobody knew
            assert reserved[0].error.kind.retriable
        await abort_as_a_router(pair.decode, reserved[1:])
    await no_page_is_held(service.decode[0])
    await pair_works(service)


async def test_death_of_the_router_aborts_its_requests_on_both_workers(service: Service) -> None:
    async with connected(service) as pair:
        await begin_transfers(service, pair, range(40, 43))
    for process in service.workers:
        await no_page_is_held(process)
    await pair_works(service)


async def test_an_abort_on_decode_reaches_prefill(service: Service) -> None:
    async with connected(service) as pair:
        started, reserved = await begin_transfers(service, pair, range(50, 51))
        await pair.decode.abort(reserved[0])
        await asyncio.wait_for(asyncio.gather(started[0].over, reserved[0].over), 10)
        assert started[0].error is not None
        assert started[0].error.kind is ErrorKind.TRANSFER
    for process in service.workers:
        await no_page_is_held(process)


# ---- orderly ends ---------------------------------------------------------------------------------------------------
async def test_sigterm_lets_prefill_finish_its_handoffs(service: Service) -> None:
    seeds = range(60, 63)
    async with connected(service) as pair:
        started, reserved = await begin_transfers(service, pair, seeds)
        service.prefill[0].terminate()
        await pair.prefill.wait(lambda: bool(pair.prefill.loads) and pair.prefill.loads[-1].draining, 30)
        late = await pair.prefill.submit(Mode.PREFILL, long_prompt(60), ticket=await reserved[0].ticket)
        tokens = [
            [(await first.first()).token_id, *await rest.end()] for first, rest in zip(started, reserved, strict=True)
        ]
        assert service.prefill[0].wait() == 0
        for seed, got in zip(seeds, tokens, strict=True):
            alone = await pair.decode.submit(
                Mode.LOCAL, long_prompt(seed), sampling=GREEDY, raw={"cache_salt": "alone"}
            )
            assert await alone.end() == got
        assert late.error is not None
        assert late.error.kind is ErrorKind.DRAINING


async def test_sigterm_lets_decode_finish_and_ends_with_zero(service: Service) -> None:
    many = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    async with connected(service) as pair:
        answer = await pair.decode.submit(Mode.LOCAL, long_prompt(70)[:50], sampling=many)
        await answer.first()
        service.decode[0].terminate()
        assert len(await answer.end()) == 100
        assert service.decode[0].wait() == 0


async def test_a_second_signal_ends_at_once(service: Service) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=CONTEXT - 10, ignore_eos=True)
    async with connected(service) as pair:
        answer = await pair.decode.submit(Mode.LOCAL, [1], sampling=endless)
        await answer.first()
        service.decode[0].terminate()
        await pair.decode.wait(lambda: bool(pair.decode.loads) and pair.decode.loads[-1].draining)
        service.decode[0].terminate()
        assert service.decode[0].wait() == 128 + signal.SIGTERM


# ---- refusals and crashes -------------------------------------------------------------------------------------------
async def test_workers_that_do_not_fit_are_refused_by_the_field(
    service: Service, checkpoint: Path, tmp_path: Path
) -> None:
    other = tiny_checkpoint("qwen3", tmp_path / "other", seed=4, max_position_embeddings=CONTEXT)
    misfits = {
        "compute_dtype": WorkerProcess("decode", checkpoint, tmp_path, name="dtype", dtype="bfloat16"),
        "model_digest": WorkerProcess("decode", other, tmp_path, name="model"),
    }
    try:
        for process in misfits.values():
            process.start()
        async with RouterClient(service.prefill[0].address) as prefill:
            for field, process in misfits.items():
                async with RouterClient(process.wait_ready().address) as decode:
                    ticket = await (await decode.submit(Mode.RESERVE, long_prompt(1)[:64])).ticket
                    answer = await prefill.submit(Mode.PREFILL, long_prompt(1)[:64], ticket=ticket)
                    await answer.over
                    assert answer.error is not None
                    assert (answer.error.kind, answer.error.param) == (ErrorKind.INCOMPATIBLE, field)
                    assert f"{field} differs" in str(answer.error)
    finally:
        for process in misfits.values():
            process.close()


BREAK_THE_RUNNER = """
import sys
from baton_engine.exec.runner import Runner
from baton_decode.main import main

launch = Runner.launch

def broken(self, plan, on_layers):
    if plan.number > 3:
        raise RuntimeError("the device fell off the bus")
    return launch(self, plan, on_layers)

Runner.launch = broken
main()
"""


async def test_a_crash_of_the_engine_answers_everybody_and_leaves_a_dump(checkpoint: Path, tmp_path: Path) -> None:
    with WorkerProcess("decode", checkpoint, tmp_path, code=BREAK_THE_RUNNER, worker_id="d0") as process:
        async with RouterClient(process.wait_ready().address) as router:
            answers = [await router.submit(Mode.LOCAL, [271, 272, 273]) for _ in range(3)]
            await asyncio.wait_for(asyncio.gather(*(answer.over for answer in answers)), 10)
            assert {answer.error.kind for answer in answers if answer.error} == {ErrorKind.INTERNAL}
        assert process.wait() == 1
    (path,) = tmp_path.glob("baton-crash-d0-*.json")
    dump = json.loads(path.read_text())
    assert dump["error"] == "RuntimeError: the device fell off the bus"
    assert dump["engine"]
    assert "271, 272" not in path.read_text().replace("\n", "").replace("  ", "")  # no prompts
