"""The router in front of real worker processes: the same text on every way, and no client notices a death."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from openai import AsyncOpenAI
from router.conftest import eventually
from support.checkpoints import tiny_checkpoint
from support.processes import Service, spawn_service

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOKENS = 300
PROMPTS = [[(7 * number + 3 * index) % 290 + 10 for index in range(40 + 9 * number)] for number in range(8)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    checkpoint = tiny_checkpoint("qwen3", folder / "tiny")
    settings = {"local_below_tokens": 0, "served_name": "tiny"}
    with spawn_service(folder, checkpoint, prefill=1, decode=2, router_settings=settings) as made:
        yield made


@pytest.fixture
def client(service: Service) -> AsyncOpenAI:
    assert service.router is not None
    return AsyncOpenAI(base_url=f"{service.router.url}/v1", api_key="none", max_retries=0)


async def state(service: Service) -> dict[str, object]:
    assert service.router is not None
    async with httpx.AsyncClient() as http:
        answer = (await http.get(f"{service.router.url}/ready")).json()
    return dict(answer)


async def ready(service: Service) -> None:
    seen: dict[str, object] = {}
    for _ in range(300):
        seen = await state(service)
        if seen["ready"]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never ready: {seen['reasons']}")


async def tokens_of(client: AsyncOpenAI, prompt: list[int], progress: list[int]) -> list[str]:
    """Token texts of one greedy stream."""
    found: list[str] = []
    stream = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True, logprobs=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            found += chunk.choices[0].logprobs.tokens or []
        progress.append(1)
    return found


async def test_whole_and_streamed_answers_agree_and_the_second_finds_its_pages(
    service: Service, client: AsyncOpenAI
) -> None:
    await ready(service)
    messages = [{"role": "user", "content": "The router chooses, prefill computes, decode goes on. " * 3}]
    whole = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
    stream = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    first, second = whole.usage, chunks[-1].usage
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < (second.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens


async def test_a_client_that_leaves_frees_both_workers(service: Service, client: AsyncOpenAI) -> None:
    await ready(service)
    stream = await client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=900, stream=True)
    await anext(stream)
    await stream.close()
    async with asyncio.timeout(10):
        while True:
            workers = (await state(service))["workers"]
            assert isinstance(workers, list)
            if not any(worker["requests"] or worker["running"] for worker in workers):
                return
            await asyncio.sleep(0.05)


async def test_streams_go_on_token_for_token_after_a_decode_worker_is_killed(
    service: Service, client: AsyncOpenAI
) -> None:
    await ready(service)
    calm = await asyncio.gather(*(tokens_of(client, prompt, []) for prompt in PROMPTS))
    progress: list[int] = []
    tasks = [asyncio.create_task(tokens_of(client, prompt, progress)) for prompt in PROMPTS]
    await eventually(lambda: len(progress) > 2 * len(PROMPTS), "all are at it", limit_s=20)
    busy = await state(service)
    assert isinstance(busy["workers"], list)
    decodes = [worker for worker in busy["workers"] if worker["role"] == "decode"]
    most = max(decodes, key=lambda worker: worker["requests"])
    next(worker for worker in service.decode if worker.address == most["address"]).kill()
    assert await asyncio.gather(*tasks) == calm
    assert all(len(tokens) == TOKENS for tokens in calm)
    assert service.router is not None
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"{service.router.url}/metrics")).text
    assert 'baton_router_retries_total{reason="lost"}' in metrics
