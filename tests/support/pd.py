"""The way of one request, and of many, through a prefill and a decode worker without a router; and what workers say of
themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
from support.processes import Service, WorkerProcess
from support.router_client import Answer, RouterClient

from baton_engine.request import Mode, SamplingParams
from baton_engine.role import TokenOut
from baton_proto import worker_pb2, worker_pb2_grpc

VOCAB = 320
CONCURRENCY = 16


@dataclass
class Pair:
    """Streams to one prefill and one decode worker."""

    prefill: RouterClient
    decode: RouterClient

    async def begin(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[Answer, Answer]:
        """Reserve on D, then prefill on P: what P and what D will answer."""
        reserved = await self.decode.submit(Mode.RESERVE, prompt, sampling=sampling)
        ticket = await reserved.ticket
        return await self.prefill.submit(Mode.PREFILL, prompt, sampling=sampling, ticket=ticket), reserved

    async def ask(self, prompt: Sequence[int], sampling: SamplingParams) -> list[TokenOut]:
        """All tokens: #1 from P, the rest from D."""
        started, reserved = await self.begin(prompt, sampling)
        first = await started.first()
        await reserved.end()
        assert [token.position for token in reserved.tokens] == list(range(1, sampling.max_tokens))
        return [first, *reserved.tokens]


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        prefill, decode = service.prefill[0], service.decode[0]
        yield Pair(
            prefill=await stack.enter_async_context(RouterClient(prefill.address)),
            decode=await stack.enter_async_context(RouterClient(decode.address)),
        )


async def status(process: WorkerProcess) -> worker_pb2.StatusReply:
    async with grpc.aio.insecure_channel(process.address) as channel:
        return await worker_pb2_grpc.AdminStub(channel).Status(worker_pb2.StatusRequest())


async def arrived_bytes(process: WorkerProcess) -> int:
    """Of KV, over the links that are up."""
    return sum(peer.bytes for peer in (await status(process)).peers if peer.state == "up")


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def no_page_is_held(process: WorkerProcess) -> None:
    async def all_back() -> bool:
        pages = (await status(process)).pages
        return pages.free + pages.cached == pages.total

    await until(all_back)


async def outputs(started: Answer, reserved: Answer) -> list[int]:
    """All tokens of a handoff, of what P and D answer."""
    first = await started.first()
    return [first.token_id, *await reserved.end()]


async def alone(process: WorkerProcess, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What a colocated worker answers."""
    async with RouterClient(process.address) as router:
        return await (await router.submit(Mode.LOCAL, prompt, sampling=sampling)).end()


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts; most share a prefix of some pages, of part of a page, or all but the last token with others."""
    rng = random.Random(seed)
    roots = [[rng.randrange(VOCAB) for _ in range(length)] for length in (7, 16, 33, 64, 100)]
    made = []
    for _ in range(count):
        suffix = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 15, 16, 17, 40, 90)))]
        made.append([*rng.choice([[], *roots]), *suffix])
    return made


async def side_by_side(
    questions: Sequence[tuple[Sequence[int], SamplingParams]],
    ask: Callable[[Sequence[int], SamplingParams], Awaitable[list[TokenOut]]],
) -> list[list[TokenOut]]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: Sequence[int], sampling: SamplingParams) -> list[TokenOut]:
        async with gate:
            return await ask(prompt, sampling)

    return list(await asyncio.gather(*(one(prompt, sampling) for prompt, sampling in questions)))


def ids(answers: Sequence[Sequence[TokenOut]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]
