"""Turn n+1 meets a prefill worker that has never seen the conversation: its pages come back from the decode worker.

Real processes over each wire. Weights are random and float32, so a wrong or missing page changes the tokens. A pull has
a short deadline, and a machine may be busy: what shows that pages came back has several conversations to show it with.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.kv_wires import over
from support.pd import VOCAB, Pair, alone, no_page_is_held, outputs, status, until
from support.processes import Service, WorkerProcess, spawn_service
from support.router_client import RouterClient

from baton_common.errors import ErrorKind
from baton_engine.request import Mode, SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

PAGE_TOKENS = 16
OUTPUTS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
ATTEMPTS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(scope="module")
def colocated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess("colocated", checkpoint, tmp_path_factory.mktemp("colocated")) as process:
        yield process.wait_ready()


@pytest.fixture(scope="module", params=over("shm", "tcp"))
def service(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
            ) -> Iterator[Service]:  # fmt: skip
    """Two prefill workers and one decode worker, each of which keeps its address when it is started again."""
    folder = tmp_path_factory.mktemp(str(request.param))
    with spawn_service(
        folder, checkpoint, prefill=2, router=False, wire=request.param, fixed_ports=True
    ) as service:  # fmt: skip
        yield service


@dataclass
class Turns:
    """One decode worker, and the prefill workers of the first turn and of the next."""

    first: Pair
    next: Pair

    async def talk(self, rng: random.Random, tokens: int = 200) -> list[int]:
        """A conversation after its first turn: what the client sends next."""
        prompt = [rng.randrange(VOCAB) for _ in range(tokens)]
        answer = await self.first.ask(prompt, GREEDY)
        return [*prompt, *(token.token_id for token in answer), *(rng.randrange(VOCAB) for _ in range(40))]


@asynccontextmanager
async def turns(service: Service) -> AsyncIterator[Turns]:
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(RouterClient(worker.address))
            for worker in (*service.prefill, service.decode[0])
        ]
        yield Turns(Pair(clients[0], clients[2]), Pair(clients[1], clients[2]))


def decoded_pages(prompt: Sequence[int]) -> int:
    """Tokens in full pages whose KV decode has of the turn before: all but its last output."""
    return (len(prompt) - 40 - 1) // PAGE_TOKENS * PAGE_TOKENS


async def pulled(service: Service, colocated: WorkerProcess, seed: int) -> None:
    """Conversations until the pages of one came back in time; the tokens of all of them are right."""
    rng = random.Random(seed)
    async with turns(service) as both:
        for _ in range(ATTEMPTS):
            prompt = await both.talk(rng)
            started, reserved = await both.next.begin(prompt, GREEDY)
            tokens = await outputs(started, reserved)
            assert tokens == await alone(colocated, prompt, GREEDY)
            assert (await reserved.ticket).first_missing_token == decoded_pages(prompt)
            if started.tokens[0].cached_tokens == decoded_pages(prompt):
                return
    raise AssertionError(f"no pages came back in {ATTEMPTS} conversations:\n{service.prefill[1].log()[-3000:]}")


async def test_pages_come_back_and_tokens_are_those_of_a_colocated_worker(
    service: Service, colocated: WorkerProcess
) -> None:
    await pulled(service, colocated, seed=1)
    directions = {peer.worker_id for peer in (await status(service.prefill[1])).peers}
    assert directions, "links are told"
    for process in service.workers:
        await no_page_is_held(process)


async def test_of_a_prompt_it_computed_itself_prefill_pulls_only_the_answer(
    service: Service, colocated: WorkerProcess
) -> None:
    rng = random.Random(9)
    long = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    async with turns(service) as both:
        for _ in range(ATTEMPTS):
            prompt = [rng.randrange(VOCAB) for _ in range(200)]
            answer = [token.token_id for token in await both.first.ask(prompt, long)]
            turn = [*prompt, *answer, *(rng.randrange(VOCAB) for _ in range(40))]
            started, reserved = await both.first.begin(turn, GREEDY)
            assert await outputs(started, reserved) == await alone(colocated, turn, GREEDY)
            if started.tokens[0].cached_tokens == decoded_pages(turn):
                break
        else:
            raise AssertionError(f"no answer came back:\n{service.prefill[0].log()[-3000:]}")
    came = [record for record in service.prefill[0].records() if record["message"] == "KV pulled back"]
    assert came[-1]["tokens"] == decoded_pages(turn) - len(prompt) // PAGE_TOKENS * PAGE_TOKENS
    for process in service.workers:
        await no_page_is_held(process)


async def test_a_pull_for_other_tokens_is_refused_and_the_prompt_is_computed(
    service: Service, colocated: WorkerProcess
) -> None:
    """P was told another cache salt: its page hashes are others, and D must not send."""
    async with turns(service) as both:
        prompt = await both.talk(random.Random(2))
        reserved = await both.next.decode.submit(Mode.RESERVE, prompt, sampling=GREEDY)
        started = await both.next.prefill.submit(
            Mode.PREFILL, prompt, sampling=GREEDY, ticket=await reserved.ticket, raw={"cache_salt": "another"}
        )
        assert await outputs(started, reserved) == await alone(colocated, prompt, GREEDY)
        assert started.tokens[0].cached_tokens == 0
    assert any(
        record["message"] == "pull refused" and "page_hash" in record["why"] for record in service.decode[0].records()
    )
    for process in service.workers:
        await no_page_is_held(process)


async def test_a_decode_worker_that_stops_before_it_answers_is_not_waited_for(
    service: Service, colocated: WorkerProcess
) -> None:
    async with turns(service) as both:
        prompt = await both.talk(random.Random(3))
        reserved = await both.next.decode.submit(Mode.RESERVE, prompt, sampling=GREEDY)
        ticket = await reserved.ticket
        service.decode[0].stop()
        try:
            started = await both.next.prefill.submit(Mode.PREFILL, prompt, sampling=GREEDY, ticket=ticket)
            first = await started.first()  # computed: the pull was given up
        finally:
            service.decode[0].resume()
        assert [first.token_id] == (await alone(colocated, prompt, GREEDY))[:1]
        assert first.cached_tokens == 0
        await reserved.over
        if reserved.error is None:  # else the silence ended the link before the handoff came through
            assert [first.token_id, *reserved.token_ids] == await alone(colocated, prompt, GREEDY)
        else:
            assert reserved.error.kind is ErrorKind.TRANSFER
    for process in service.workers:
        await no_page_is_held(process)


async def test_workers_in_both_directions_can_be_killed_and_come_back(
    service: Service, colocated: WorkerProcess
) -> None:
    await pulled(service, colocated, seed=4)
    decode, puller = service.decode[0], service.prefill[1]
    async with turns(service) as both:
        prompt = await both.talk(random.Random(5))
        reserved = await both.next.decode.submit(Mode.RESERVE, prompt, sampling=GREEDY)
        ticket = await reserved.ticket
        decode.kill()
        decode.wait()
        started = await both.next.prefill.submit(Mode.PREFILL, prompt, sampling=GREEDY, ticket=ticket)
        await started.over
        assert started.error is not None
        assert started.error.kind is ErrorKind.TRANSFER
        assert started.token_ids == (await alone(colocated, prompt, GREEDY))[: len(started.token_ids)]
    await no_page_is_held(puller)
    decode.start().wait_ready()
    await pulled(service, colocated, seed=6)
    puller.kill()
    puller.wait()
    puller.start().wait_ready()
    await pulled(service, colocated, seed=7)

    async def quiet() -> bool:
        peers = (await status(decode)).peers
        return all(peer.state in ("up", "gone") for peer in peers)

    await until(quiet)
    for process in (decode, puller):
        process.terminate()
    for process in (decode, puller):
        assert process.wait(60) == 0, process.log()
        process.start()
    for process in (decode, puller):
        process.wait_ready()


@pytest.mark.parametrize(("prefill", "decode", "wire"), [(16, 64, "shm"), (64, 16, "tcp")])
async def test_pages_of_another_size_come_back(
    checkpoint: Path, colocated: WorkerProcess, tmp_path: Path, prefill: int, decode: int, wire: str
) -> None:
    """Decode answers the first turn alone. What comes back ends on a border of both sides' pages."""
    rng = random.Random(8)
    settings = {"wire": wire, "slot_bytes": 8192, "slots_per_peer": 3}
    with ExitStack() as processes:
        workers = [
            processes.enter_context(WorkerProcess(role, checkpoint, tmp_path, page_tokens=page, **settings))
            for role, page in (("prefill", prefill), ("decode", decode))
        ]
        addresses = [worker.wait_ready().address for worker in workers]
        async with RouterClient(addresses[0]) as first, RouterClient(addresses[1]) as second:
            pair, came = Pair(first, second), 0
            for _ in range(ATTEMPTS):
                turn = [rng.randrange(VOCAB) for _ in range(300)]
                turn += await (await second.submit(Mode.LOCAL, turn, sampling=GREEDY)).end()
                turn += [rng.randrange(VOCAB) for _ in range(40)]
                started, reserved = await pair.begin(turn, GREEDY)
                assert await outputs(started, reserved) == await alone(colocated, turn, GREEDY)
                has = (len(turn) - 40 - 1) // decode * decode
                assert (await reserved.ticket).first_missing_token == has
                came = started.tokens[0].cached_tokens or 0
                if came:
                    assert came == has // prefill * prefill
                    break
            assert came, workers[0].log()[-3000:]
        for worker in workers:
            await no_page_is_held(worker)
