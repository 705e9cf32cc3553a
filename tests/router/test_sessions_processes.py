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
CROWD = 10
CONTROL = {"type": "ephemeral", "ttl": "1h"}
WORDS = ["the", "router", "chooses", "a", "worker", "and", "sends", "what", "clients", "wrote", "while", "they", "wait"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    checkpoint = tiny_checkpoint("llama", folder / "tiny", seed=7)
    tiers = f"host={PAGES * FRAME_BYTES},sessions={40 * FRAME_BYTES}"
    router = {"served_name": "tiny", "local_below_tokens": 0}
    with spawn_service(folder, checkpoint, router_settings=router, tiers=tiers, pages=PAGES, max_rows=4) as made:
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
    """More prompts of others than the workers hold, host memory included."""
    draw = random.Random(seed)
    for _ in range(CROWD):
        post(service, "completions", prompt=[draw.randrange(10, 290) for _ in range(40 * PAGE_TOKENS + 5)])


def opened(service: Service, seed: int) -> tuple[list[dict[str, str]], httpx.Response]:
    """A conversation after its first answer."""
    words = " ".join(random.Random(seed).choices(WORDS, k=40))
    messages = [{"role": "user", "content": f"{seed} {words}"}]
    return messages, post(service, "chat/completions", messages=messages, cache_control=CONTROL)


def test_conversations_go_on_after_their_pages_were_needed_for_others_until_they_are_ended(service: Service) -> None:
    """Decode restores the pages from host memory, prefill pulls them back from there and computes only what is new.

    Three, because on a slow machine pages may come too late for one, and are computed.
    """
    assert service.router is not None
    begun = [opened(service, seed) for seed in range(3)]
    crowd_out(service, 100)
    turns, kept = [], []
    for messages, first in begun:
        said = first.json()["usage"]["prompt_tokens"]
        assert 4 * PAGE_TOKENS < said < 13 * PAGE_TOKENS, "a tenant's quota holds all"
        answer = first.json()["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and then"}]
        turns.append(post(service, "chat/completions", messages=messages, cache_control=CONTROL))
        assert turns[-1].headers["x-baton-session"] == first.headers["x-baton-session"]
        kept.append(cached(turns[-1]) >= (said // PAGE_TOKENS - 1) * PAGE_TOKENS)
    assert any(kept), "all but what the template wrote anew"

    for turn in turns:
        session = turn.headers["x-baton-session"]
        ended = httpx.delete(f"{service.router.url}/v1/sessions/{session}", timeout=30)
        assert ended.json() == {"id": session, "object": "session.deleted", "deleted": True, "workers": 2}
    crowd_out(service, 200)
    for (messages, _), turn in zip(begun, turns, strict=True):
        third = post(service, "chat/completions", messages=messages)
        assert cached(third) == 0
        assert third.json()["choices"][0]["message"] == turn.json()["choices"][0]["message"]


def test_what_nobody_asked_to_keep_is_gone(service: Service) -> None:
    prompt = [(7 * index) % 280 + 10 for index in range(20 * PAGE_TOKENS)]
    post(service, "completions", prompt=prompt)
    crowd_out(service, 300)
    assert cached(post(service, "completions", prompt=prompt)) == 0
