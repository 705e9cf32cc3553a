"""The OpenAI surface as the `openai` client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import openai
import pytest
from router.conftest import HELLO, MODEL, House, chat_ids, eventually
from router.fake_worker import expected

from baton_proto import worker_pb2 as wire
from baton_router.detokenise import Vocabulary


def text_of(house: House, ids: list[int]) -> str:
    return str(house.checkpoint.tokenizer.decode(ids))


async def test_a_chat_answer_is_the_text_of_the_tokens(house: House) -> None:
    await house.pair()
    await house.serve()
    answer = await house.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12)
    ids = chat_ids(house)
    assert answer.choices[0].message.content == text_of(house, expected(ids, 12))
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.usage.total_tokens == len(ids) + 12


async def test_a_chat_stream_has_role_deltas_reason_and_usage(house: House) -> None:
    prefill, _ = await house.pair()
    prefill.cached_tokens = 5
    await house.serve()
    stream = await house.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(house, expected(chat_ids(house), 9))
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length"
    assert not any(reasons[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (9, 5)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_plain_completions_take_text_ids_and_batches(house: House) -> None:
    await house.pair()
    await house.serve()
    client, tokenizer = house.client(), house.checkpoint.tokenizer
    once = tokenizer.encode("once upon").ids
    answer = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=5)
    assert answer.choices[0].text == text_of(house, expected(once, 5))
    by_ids = await client.completions.create(model=MODEL, prompt=once, max_tokens=5)
    assert by_ids.choices[0].text == answer.choices[0].text
    batch = await client.completions.create(model=MODEL, prompt=["once upon", "a time"], max_tokens=5, n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert batch.choices[0].text == batch.choices[1].text == answer.choices[0].text
    assert batch.choices[2].text == text_of(house, expected(tokenizer.encode("a time").ids, 5))
    default = await client.completions.create(model=MODEL, prompt="once upon")
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    echoed = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=5, echo=True)
    assert echoed.choices[0].text == "once upon" + answer.choices[0].text


async def test_completion_streams_end_with_their_reason(house: House) -> None:
    await house.pair()
    await house.serve()
    stream = await house.client().completions.create(model=MODEL, prompt="once", max_tokens=6, stream=True)
    chunks = [chunk async for chunk in stream]
    ids = house.checkpoint.tokenizer.encode("once").ids
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(house, expected(ids, 6))
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_choices_draw_with_seed_plus_index_and_a_long_prompt_is_prefilled_once_first(house: House) -> None:
    prefill, _ = await house.pair(tick_s=0.01)
    await house.serve()
    long_prompt = [100 + n % 100 for n in range(200)]
    answer = await house.client().completions.create(model=MODEL, prompt=long_prompt, max_tokens=4, n=3, seed=7)
    assert len(answer.choices) == 3
    assert sorted(submit.sampling.seed for submit in prefill.submits) == [7, 8, 9]
    assert prefill.submits[0].sampling.seed == 7
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (200, 12)


async def test_without_a_seed_two_requests_differ_in_theirs(house: House) -> None:
    prefill, _ = await house.pair()
    await house.serve()
    for _ in range(2):
        await house.client().completions.create(model=MODEL, prompt="x", max_tokens=1)
    assert prefill.submits[0].sampling.seed != prefill.submits[1].sampling.seed


def spelling(house: House, text: str) -> list[int]:
    """Ids that spell a text character by character."""
    return [house.checkpoint.tokenizer.token_to_id(char) for char in text]


async def test_a_stop_string_across_tokens_ends_the_answer_and_frees_the_worker(house: House) -> None:
    ids = spelling(house, "abcSTOPdefghijklmnopqrstuvwxyz" * 5)
    function = lambda tokens, prompt: ids[len(tokens) - prompt]  # noqa: E731
    _, decode = await house.pair(function=function)
    await house.serve()
    stream = await house.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=100, stop=["STOP", "zzz"], stream=True
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "abc"
    assert chunks[-1].choices[0].finish_reason == "stop"
    await eventually(lambda: bool(decode.aborts), "decode was told to stop")
    assert not decode.running


async def test_stop_token_ids_and_end_of_sequence_are_not_shown(house: House) -> None:
    ids = spelling(house, "abcd")
    function = lambda tokens, prompt: [*ids, 2][len(tokens) - prompt]  # noqa: E731
    await house.pair(function=function)
    await house.serve()
    client = house.client()
    ended = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("abcd", "stop")
    stopped = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=50, extra_body={"stop_token_ids": [ids[2]]}
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("ab", "stop")


async def test_half_a_character_is_never_streamed(house: House) -> None:
    text = "añ€😀z"
    alphabet = [house.checkpoint.tokenizer.token_to_id(char) for char in _byte_chars(text.encode())]
    function = lambda tokens, prompt: alphabet[len(tokens) - prompt]  # noqa: E731
    await house.pair(function=function)
    await house.serve()
    stream = await house.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=len(alphabet), stream=True
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def _byte_chars(raw: bytes) -> list[str]:
    from baton_router.detokenise import _ALPHABET  # noqa: PLC0415

    back = {byte: char for char, byte in _ALPHABET.items()}
    return [back[byte] for byte in raw]


async def test_chat_logprobs_have_text_bytes_and_alternatives(house: House) -> None:
    await house.pair()
    await house.serve()
    answer = await house.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    ids = expected(chat_ids(house), 3)
    vocabulary = Vocabulary(house.checkpoint.tokenizer)
    assert [item.token for item in logprobs.content] == [vocabulary.token_text(token)[0] for token in ids]
    assert [item.bytes for item in logprobs.content] == [list(vocabulary.token_text(token)[1]) for token in ids]
    assert logprobs.content[0].logprob == pytest.approx(-0.5)
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == pytest.approx([-0.5, -1.5])


async def test_completion_logprobs_have_offsets(house: House) -> None:
    ids = spelling(house, "abcd")
    await house.pair(function=lambda tokens, prompt: ids[len(tokens) - prompt])
    await house.serve()
    answer = await house.client().completions.create(model=MODEL, prompt="x", max_tokens=4, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c", "d"]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == pytest.approx({"a": -0.5})


async def test_logprobs_of_a_stop_string_stay_hidden(house: House) -> None:
    ids = spelling(house, "abSTOP" + "c" * 60)
    await house.pair(function=lambda tokens, prompt: ids[len(tokens) - prompt])
    await house.serve()
    answer = await house.client().completions.create(model=MODEL, prompt="x", max_tokens=50, logprobs=0, stop="STOP")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (answer.choices[0].text, logprobs.tokens) == ("ab", ["a", "b"])


async def test_parameters_reach_the_workers(house: House) -> None:
    prefill, decode = await house.pair()
    await house.serve()
    await house.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, temperature=0.5, top_p=0.9, presence_penalty=0.25, seed=-1,
        frequency_penalty=-0.5, logit_bias={"5": 2.5}, user="u", metadata={"a": "b"}, store=False,
        extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True,
                    "cache_salt": "tenant", "priority": 4},
    )  # fmt: skip
    for submit in (prefill.submits[0], decode.submits[0]):
        sampling = submit.sampling
        assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 3, 0.125)
        assert sampling.top_p == pytest.approx(0.9)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
        assert dict(sampling.logit_bias) == {5: 2.5}
        assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 4, 2)
        assert (sampling.repetition_penalty, sampling.ignore_eos) == (1.5, True)
        assert (submit.cache_salt, submit.priority) == ("tenant", 4)
        assert 19_000 < submit.deadline_ms <= 20_000


async def test_models_are_listed_and_shown(house: House) -> None:
    await house.pair()
    await house.serve()
    client = house.client()
    listed = await client.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_a_client_that_leaves_is_aborted_on_both_workers(
    house: House, http: httpx.AsyncClient, record_property: Callable[[str, object], None]
) -> None:
    prefill, decode = await house.pair()
    decode.script.hold = True
    prefill.script.hold_handoff = True  # both hold something: token #1 is out, the handover is not over
    url = await house.serve()
    body = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 50}
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        await anext(answer.aiter_bytes())
        left_s = asyncio.get_running_loop().time()
    await eventually(lambda: bool(prefill.aborts and decode.aborts), "both workers heard of it")
    latest_s = max(prefill.aborts[0][1], decode.aborts[0][1])
    record_property("disconnect_to_abort_ms", round(1000 * (latest_s - left_s), 2))
    assert "disconnected" in decode.aborts[0][2]
    assert house.router is not None
    router = house.router
    await eventually(lambda: not router._inflight, "nothing is left in flight")


async def test_a_client_that_leaves_while_it_waits_is_aborted_too(house: House, http: httpx.AsyncClient) -> None:
    prefill, decode = await house.pair()
    prefill.script.hold = True
    url = await house.serve()
    with pytest.raises(httpx.ReadTimeout):
        await http.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=0.1)
    await eventually(lambda: bool(prefill.aborts and decode.aborts), "both workers heard of it")


async def test_one_step_is_one_write_per_stream(house: House, http: httpx.AsyncClient) -> None:
    await house.pair(tick_s=0.01)
    url = await house.serve()
    body = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 8, "n": 4}
    chunks = []
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        chunks += [chunk async for chunk in answer.aiter_raw()]
    events = [json.loads(line[6:]) for line in b"".join(chunks).split(b"\n\n") if line.startswith(b"data: {")]
    assert {event["choices"][0]["index"] for event in events} == {0, 1, 2, 3}
    assert len(chunks) < len(events)  # four choices share their steps, and so their writes


async def test_ready_needs_one_of_each_role_and_equal_compat(house: House, http: httpx.AsyncClient) -> None:
    prefill = await house.add(wire.ROLE_PREFILL)
    url = await house.serve()
    alone = await http.get(f"{url}/ready")
    assert alone.status_code == 503
    assert alone.json()["reasons"] == ["no decode worker is up"]
    assert prefill.streams


async def test_ready_names_the_field_that_differs(house: House, http: httpx.AsyncClient) -> None:
    await house.add(wire.ROLE_PREFILL, model_digest="one", worker_id="p0")
    await house.add(wire.ROLE_DECODE, model_digest="two", worker_id="d0")
    url = await house.serve()
    answer = await http.get(f"{url}/ready")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["prefill p0 and decode d0 do not fit: model_digest differs: 'one' and 'two'"]


async def test_workers_with_unequal_pages_are_a_pair(house: House, http: httpx.AsyncClient) -> None:
    await house.add(wire.ROLE_PREFILL, page_tokens=16)
    await house.add(wire.ROLE_DECODE, page_tokens=32)
    url = await house.serve()
    assert (await http.get(f"{url}/ready")).json()["ready"]


@pytest.mark.parametrize("roles", [(wire.ROLE_PREFILL, wire.ROLE_DECODE), (wire.ROLE_COLOCATED,)])
async def test_ready_with_a_pair_or_a_colocated_worker(
    house: House, http: httpx.AsyncClient, roles: tuple[wire.Role, ...]
) -> None:
    for role in roles:
        await house.add(role)
    url = await house.serve()
    answer = await http.get(f"{url}/ready")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert {row["state"] for row in answer.json()["workers"]} == {"up"}


async def test_health_and_metrics(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    assert (await http.get(f"{url}/health")).json()["status"] == "ok"
    await house.client().completions.create(model=MODEL, prompt="x", max_tokens=5)
    await http.post(f"{url}/v1/completions", content=b"{")
    text = (await http.get(f"{url}/metrics")).text
    for line in (
        'baton_router_requests_total{code="200",endpoint="completions"} 1.0',
        'baton_router_requests_total{code="400",endpoint="completions"} 1.0',
        "baton_router_output_tokens_total 5.0",
        "baton_router_ttft_seconds_count 1.0",
        "baton_router_itl_seconds_count 4.0",
        'baton_router_placed_total{how="handoff"} 1.0',
        "baton_router_inflight 0.0",
    ):
        assert line in text, line
    assert text.count("baton_router_worker_up{") == 2


async def test_the_synchronous_client_works_too(house: House) -> None:
    await house.pair()
    url = await house.serve()

    def ask() -> str:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=7, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == text_of(house, expected(chat_ids(house), 7))
