"""A pull that ends in its middle: a worker dies, stops, or somebody leaves while chunks are under way.

The workers do it themselves when some of many chunks left or landed, so that the middle is really reached. Weights are
random and float32, so a wrong or missing page changes the tokens. A pull has a short deadline, and a machine may be
busy: where one is over before its middle, another conversation is tried.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.kv_wires import over as over_wires
from support.pd import VOCAB, Pair, connected, no_page_is_held, outputs, until
from support.pd_victim import Action, Trap, victims
from support.processes import Service, WorkerProcess
from support.router_client import Answer

from baton_common.errors import ErrorKind
from baton_engine.request import Mode, SamplingParams

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

PAGE_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SETTINGS = {"slot_bytes": 8192, "slots_per_peer": 3, "pages": 512, "alive_interval_s": 2.0}
"""Some 30 chunks for a conversation, ten times the slots. A pull is given up long before its peer counts as dead."""
MIDDLE = 5
ATTEMPTS = 6
LIMIT_S = 60.0


async def alone(pair: Pair, prompt: list[int]) -> list[int]:
    """What decode answers without any page of others."""
    answer = await pair.decode.submit(Mode.LOCAL, prompt, sampling=GREEDY, raw={"cache_salt": "alone"})
    return await answer.end()


@dataclass
class Caught:
    prompt: list[int]
    expected: list[int]  # tokens of a worker that does all alone
    started: Answer  # of P
    reserved: Answer  # of D


@dataclass
class World:
    service: Service
    folder: Path
    rng: random.Random = field(default_factory=lambda: random.Random(3))

    @property
    def prefill(self) -> WorkerProcess:
        return self.service.prefill[0]

    @property
    def decode(self) -> WorkerProcess:
        return self.service.decode[0]

    def draw(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    async def talk(self, pair: Pair) -> list[int]:
        """A conversation whose first turn decode answered alone, so that only decode has KV of it: what comes next."""
        said = self.draw(300)
        return [*said, *await (await pair.decode.submit(Mode.LOCAL, said, sampling=GREEDY)).end(), *self.draw(40)]

    async def caught(self, pair: Pair, trap: Trap, action: Action, point: str) -> Caught:
        """The next turn of a conversation, in the middle of its pull."""
        for _ in range(ATTEMPTS):
            prompt = await self.talk(pair)
            expected = await alone(pair, prompt)
            trap.set(action, point)
            started, reserved = await pair.begin(prompt, GREEDY)

            async def over(reserved: Answer = reserved) -> bool:
                return trap.sprung or reserved.over.done()

            await until(over, LIMIT_S)
            if trap.sprung:
                return Caught(prompt, expected, started, reserved)
        raise AssertionError(f"no pull reached {point!r} in {ATTEMPTS} conversations:\n{self.prefill.log()[-3000:]}")

    def pulled(self) -> int:
        """How many pulls brought everything."""
        return sum(record["message"] == "KV pulled back" for record in self.prefill.records())

    async def pulls(self) -> None:
        """Both serve: pages of a conversation come back, and the tokens of all are right."""
        async with connected(self.service) as pair:
            for _ in range(ATTEMPTS):
                prompt = await self.talk(pair)
                started, reserved = await pair.begin(prompt, GREEDY)
                assert await outputs(started, reserved) == await alone(pair, prompt)
                if started.tokens[0].cached_tokens == (len(prompt) - 40 - 1) // PAGE_TOKENS * PAGE_TOKENS:
                    break
            else:
                raise AssertionError(f"no pages came back in {ATTEMPTS} conversations:\n{self.prefill.log()[-3000:]}")
        for process in self.service.workers:
            await no_page_is_held(process)


@pytest.fixture(scope="module", params=over_wires("shm", "tcp"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(str(request.param))
    checkpoint = tiny_checkpoint("llama", folder / "model", seed=7)
    with victims(folder, checkpoint, wire=request.param, **SETTINGS) as service:
        yield World(service, folder)


@pytest.fixture
def lender(world: World) -> Iterator[Trap]:
    """In decode, which sends. Whatever it holds goes on after the test."""
    trap = Trap(world.folder, "decode")
    yield trap
    trap.let_go()
    world.decode.resume()


async def kind(answer: Answer) -> ErrorKind | None:
    await asyncio.wait_for(answer.over, LIMIT_S)
    return None if answer.error is None else answer.error.kind


async def others_are_served(world: World, pair: Pair) -> None:
    """A handoff of a prompt that nobody knows, beside a pull that hangs."""
    prompt = world.draw(100)
    assert await outputs(*await pair.begin(prompt, GREEDY)) == await alone(pair, prompt)


async def died(worker: WorkerProcess) -> None:
    assert await asyncio.to_thread(worker.wait, LIMIT_S) == -signal.SIGKILL


# ---- nobody dies ----------------------------------------------------------------------------------------------------
async def test_what_a_stopped_decode_worker_did_not_send_is_computed(world: World, lender: Trap) -> None:
    async with connected(world.service) as pair:
        turn = await world.caught(pair, lender, "stop", f"pushed {MIDDLE}")
        first = await asyncio.wait_for(turn.started.first(), LIMIT_S)
        world.decode.resume()  # the rest of the pull comes late, and finds nobody
        assert (first.token_id, first.cached_tokens) == (turn.expected[0], 0)
        error = await kind(turn.reserved)
        if error is None:
            assert [first.token_id, *turn.reserved.token_ids] == turn.expected
        else:  # a machine so slow that the stop was taken for a death
            assert error is ErrorKind.TRANSFER
    await world.pulls()


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(world: World, lender: Trap) -> None:
    before = world.pulled()
    async with connected(world.service) as pair:
        turn = await world.caught(pair, lender, "hold", f"pushed {MIDDLE}")
        await pair.prefill.abort(turn.started)
        assert await kind(turn.started) is ErrorKind.ABORTED
        assert turn.started.tokens == []
        await no_page_is_held(world.prefill)  # without waiting for the rest of the pull
        await others_are_served(world, pair)
        lender.let_go()  # the reservation is still there, and decode would send the rest
        await others_are_served(world, pair)
        await pair.decode.abort(turn.reserved)
        assert await kind(turn.reserved) is ErrorKind.ABORTED
        assert turn.reserved.tokens == []
    assert world.pulled() == before
    await world.pulls()


async def test_a_reservation_that_ends_in_the_middle_ends_its_pull(world: World, lender: Trap) -> None:
    """Prefill goes on alone, until it hears that nobody waits for its KV."""
    before = world.pulled()
    async with connected(world.service) as pair:
        turn = await world.caught(pair, lender, "hold", f"pushed {MIDDLE}")
        await pair.decode.abort(turn.reserved)
        assert await kind(turn.reserved) is ErrorKind.ABORTED
        await no_page_is_held(world.decode)
        lender.let_go()
        assert await kind(turn.started) is ErrorKind.TRANSFER
        assert turn.started.token_ids == turn.expected[: len(turn.started.token_ids)]
    assert world.pulled() == before, "the pages are not the request's any more"
    await world.pulls()


# ---- deaths ---------------------------------------------------------------------------------------------------------
async def test_decode_dies_in_the_middle(world: World, lender: Trap) -> None:
    async with connected(world.service) as pair:
        turn = await world.caught(pair, lender, "die", f"pushed {MIDDLE}")
        await died(world.decode)
        assert await kind(turn.started) is ErrorKind.TRANSFER, "nobody is there to take its KV"
        assert turn.started.token_ids == turn.expected[: len(turn.started.token_ids)]
        await no_page_is_held(world.prefill)
    world.decode.start().wait_ready()
    async with connected(world.service) as pair:  # as a router repeats it
        assert await outputs(*await pair.begin(turn.prompt, GREEDY)) == turn.expected
    await world.pulls()


async def test_prefill_dies_in_the_middle(world: World) -> None:
    async with connected(world.service) as pair:
        turn = await world.caught(pair, Trap(world.folder, "prefill"), "die", f"landed {MIDDLE}")
        await died(world.prefill)
        await pair.decode.abort(turn.reserved)  # the router ends what nobody will send
        assert await kind(turn.reserved) is ErrorKind.ABORTED
        await no_page_is_held(world.decode)
    world.prefill.start().wait_ready()
    async with connected(world.service) as pair:
        assert await outputs(*await pair.begin(turn.prompt, GREEDY)) == turn.expected
    await world.pulls()
