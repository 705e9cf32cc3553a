"""A conversation with pauses, over real processes: what `cache_control` keeps is there for the next turn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.checkpoints import tiny_checkpoint
from support.processes import Service, spawn_service

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(300)]

PAGE_TOKENS = 16
FRAME_BYTES = 3 * 2 * 2 * PAGE_TOKENS * 16 * 4 + 64  # layers, keys and values, heads, tokens, dim, float32; header
PAGES = 64
CROWD = 6
WORDS = ["the", "router", "chooses", "a", "worker", "and", "sends", "what", "clients", "wrote", "while", "they", "wait"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    checkpoint = tiny_checkpoint("llama", folder / "tiny", seed=7)
    tiers = f"host={PAGES * FRAME_BYTES},sessions={40 * FRAME_BYTES}"
    settings = {"tiers": tiers, "pages": PAGES, "max_rows": 4, "router_settings": {"served_name": "tiny"}}
    with spawn_service(folder, checkpoint, prefill=0, decode=0, colocated=1, **settings) as made:
        yield made


def post(service: Service, path: str, **body: Any) -> httpx.Response:
    assert service.router is not None
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
    answer = httpx.post(f"{service.router.url}/v1/{path}", json=asked, timeout=100)
    assert answer.status_code == 200, answer.text
    return answer


def cached(answer: httpx.Response) -> int:
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def crowd_out(service: Service, seed: int) -> None:
    """More prompts of others than the worker holds, host memory included."""
    draw = random.Random(seed)
    for _ in range(CROWD):
        post(service, "completions", prompt=[draw.randrange(10, 290) for _ in range(40 * PAGE_TOKENS + 5)])


def test_a_conversation_goes_on_after_its_pages_were_needed_for_others_until_it_is_ended(service: Service) -> None:
    assert service.router is not None
    draw = random.Random(1)
    opening = " ".join(draw.choices(WORDS, k=60))
    turn: list[dict[str, str]] = [{"role": "user", "content": opening}]
    control = {"type": "ephemeral", "ttl": "1h"}
    first = post(service, "chat/completions", messages=turn, cache_control=control)
    session = first.headers["x-baton-session"]
    said = first.json()["usage"]["prompt_tokens"]
    assert 4 * PAGE_TOKENS < said < 36 * PAGE_TOKENS, "a tenant's quota holds it"
    crowd_out(service, 100)

    answer = first.json()["choices"][0]["message"]
    turn += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "and then"}]
    second = post(service, "chat/completions", messages=turn, cache_control=control)
    assert second.headers["x-baton-session"] == session
    assert cached(second) >= (said // PAGE_TOKENS - 1) * PAGE_TOKENS, "all but what the template wrote anew"

    ended = httpx.delete(f"{service.router.url}/v1/sessions/{session}", timeout=30)
    assert ended.json() == {"id": session, "object": "session.deleted", "deleted": True, "workers": 1}
    crowd_out(service, 200)
    third = post(service, "chat/completions", messages=turn)
    assert cached(third) == 0
    assert third.json()["choices"][0]["message"] == second.json()["choices"][0]["message"]


def test_what_nobody_asked_to_keep_is_gone(service: Service) -> None:
    prompt = [(7 * index) % 280 + 10 for index in range(20 * PAGE_TOKENS)]
    post(service, "completions", prompt=prompt)
    crowd_out(service, 300)
    assert cached(post(service, "completions", prompt=prompt)) == 0
